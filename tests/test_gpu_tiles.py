"""The tiles of `make gpu` on the emulated CUDA kernels: order, checks, forced tiles, the clock, comparison, report."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cuda_emulated
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.contenders import Contender
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import session as gpu
from benchmarks.gpu import tiles as gpu_tiles
from benchmarks.gpu.tiles import Tile
from benchmarks.gpu.workloads import Case, all_cases
from benchmarks.timing import Budget, Samples
from benchmarks.workloads import Inputs, Workload
from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends.native import cuda_module

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "a device of the tests"
CHOICE = Tile(8, 32)  # what stands for the planner's choice
TINY = Case(Workload("custom", 3, dtype="bfloat16", labels="random", batch=2, height=9, width=20))
OTHER = Case(TINY.workload.replace(dataset="another", num_classes=4))
needs_emulation = pytest.mark.skipif(
    not (cuda_ops.emulated() and cuda_module() is not None), reason="there is no emulated CUDA module here"
)


class Machine:
    """The emulated module, whose planner takes CHOICE; notes what ran, and can go wrong with some tiles."""

    def __init__(self, wrong: tuple[Tile, ...] = (), failing: tuple[Tile, ...] = (), error: str = "no launch") -> None:
        self.wrong, self.failing, self.error = wrong, failing, error
        self.ran: list[tuple[str, Tile]] = []
        self.idle = False  # launches do nothing
        self.forced = (0, 0)
        self._module: Any = cuda_module()
        self._library = ctypes.CDLL(os.environ[cuda_emulated.VARIABLE])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def force_tile(self, rows: int, width: int) -> None:
        self.forced = (rows, width)

    def plan(self, params: Any, device: int, backward: bool) -> dict[str, int]:
        return self._with_tile(self._module.plan, params, device, backward)

    def cuda_forward(self, params: Any, workspace: tuple[int, int], device: int, stream: int) -> None:
        self._run("forward", params, workspace, device, stream)
        if self.tile in self.wrong:
            ctypes.c_float.from_address(params.terms[0]).value *= 1.0001

    def cuda_backward(self, params: Any, workspace: tuple[int, int], device: int, stream: int) -> None:
        self._run("backward", params, workspace, device, stream)

    @property
    def tile(self) -> Tile:
        return Tile(*self.forced) if any(self.forced) else CHOICE

    def _run(self, direction: str, *arguments: Any) -> None:
        self.ran.append((direction, self.tile))
        if self.tile in self.failing:
            raise RuntimeError(self.error)
        if self.idle:
            return
        self._with_tile(getattr(self._module, f"cuda_{direction}"), *arguments)

    def _with_tile(self, call: Callable[..., Any], *arguments: Any) -> Any:
        for name, value in zip(("tile_rows", "tile_width"), self.tile, strict=True):
            assert self._library.semeda_fast_emulation_set(name.encode(), ctypes.c_int64(value)) == 0
        try:
            return call(*arguments)
        finally:
            for name in ("tile_rows", "tile_width"):
                self._library.semeda_fast_emulation_set(name.encode(), ctypes.c_int64(0))


class Timer:
    """Stands in for `timing.interleaved`: runs each step once, and says how long it took from a table."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self.groups: list[list[str]] = []
        self.queued: list[bool] = []
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def __call__(self, steps: Mapping[str, timing.Step], budget: Budget, **options: Any) -> dict[str, Samples]:
        self.groups.append(list(steps))
        self.queued.append(options["queued"])
        self.now += 1.0
        for step in steps.values():
            step()
        drift = len(self.groups)  # of the machine, which hits all of a group alike
        return {
            name: Samples([drift * self.seconds.get(name, 0.002) * x for x in (0.9, 1.0, 1.2)], None) for name in steps
        }


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """Also few tiles, no comparison, and the timer's clock."""
    made = Timer()
    monkeypatch.setattr(timing, "interleaved", made)
    monkeypatch.setattr(gpu_tiles, "time", types.SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(gpu_tiles, "ROWS", (4, 8, 16))
    monkeypatch.setattr(gpu_tiles, "WIDTHS", (16, 32, 48))
    monkeypatch.setattr(gpu_tiles, "GROUP", 3)
    monkeypatch.setattr(gpu_tiles, "contenders", lambda device: {})
    return made


def measure(machine: Machine, *cases: Case, **options: Any) -> gpu_tiles.Results:
    found = gpu_tiles.measure(cases or (TINY,), machine, "cpu", **options)
    assert machine.forced == (0, 0)
    return found


def by_tile(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {tile["tile"]: tile for tile in record["tiles"]}


def test_the_tiles_are_those_that_the_planner_searches() -> None:
    source = ROOT / "csrc" / "cuda" / "plan.cpp"
    if not source.is_file():
        pytest.skip("the sources of the CUDA kernels are not here")
    found = dict(re.findall(r"for \(const int (width|tile_h) : \{([\d, ]+)\}\)", source.read_text(encoding="utf-8")))
    assert tuple(map(int, found["width"].split(","))) == gpu_tiles.WIDTHS
    assert tuple(map(int, found["tile_h"].split(","))) == gpu_tiles.ROWS


def test_the_workloads_are_all_there_once() -> None:
    cases = all_cases("scenes")
    assert [case.name for case in cases] == [
        "voc default bfloat16",
        "cityscapes default bfloat16",
        "ade20k default bfloat16",
        "voc default float32",
        "voc wide bfloat16",
        "voc deep bfloat16",
        "voc 16-32-32-2 bfloat16",
        "cityscapes default float32",
        "ade20k default float32",
    ]
    classes = {case.workload.dataset: case.workload.num_classes for case in cases}
    assert classes == {"voc": 21, "cityscapes": 19, "ade20k": 150}
    assert all(case.workload.labels == "scenes" for case in cases)


@needs_emulation
def test_inputs_of_a_dataset_are_drawn_once_and_match_the_workload() -> None:
    four = Case(TINY.workload, ((16, 32, 32), 2))
    inputs, full = four.inputs("cpu"), Case(TINY.workload.replace(dtype="float32")).inputs("cpu")
    assert [layer.out_channels for layer in inputs.proxy.layers] == [16, 32, 32, 2]
    assert inputs.logits.dtype == torch.bfloat16
    assert torch.equal(inputs.logits, full.logits.to(torch.bfloat16))
    assert inputs.target is full.target


@needs_emulation
def test_every_tile_is_checked_and_timed_with_the_nearest_first(timer: Timer) -> None:
    # 4x32 only looks faster than 16x32 in the groups; 16x32 is what the finals are about.
    timer.seconds = {"16x32": 0.001, "4x32": 0.0016, "4x16": 0.004}
    machine = Machine()
    results = measure(machine)
    assert results.notes == []
    assert not results.broken()
    assert [record["direction"] for record in results.tiles] == ["forward", "backward"]
    for record in results.tiles:
        tiles = by_tile(record)
        assert (record["status"], record["planner"]) == ("ok", "8x32")
        assert list(tiles) == ["8x32", "4x32", "8x16", "8x48", "16x32", "4x16", "4x48", "16x16", "16x48"]
        assert all(tile["status"] == "ok" for tile in tiles.values())
        assert tiles["16x48"]["width"] == 48
        assert tiles["16x48"]["columns"] == 44
        assert tiles["16x48"]["shared"] > tiles["4x16"]["shared"] > 0
        assert tiles["8x32"]["gain"] == [1.0, 1.0, 1.0]
        assert tiles["4x16"]["gain"][1] == pytest.approx(0.5)
        assert [tile["tile"] for tile in gpu_tiles.ranked(record)][:3] == ["16x32", "4x32", "8x32"]
        assert gpu_tiles.ranked(record)[0]["gain"][1] == pytest.approx(2.0)
        assert sum(tile["final"] for tile in tiles.values()) == 1 + gpu_tiles.TOP
        assert {"16x32", "4x32", "8x32"} <= {tile["tile"] for tile in gpu_tiles.ranked(record)}
    # The nearest of both directions, then the others and the finals of each; the planner's choice in all.
    near, rest = ["8x32", "4x32", "8x16", "8x48"], ["8x32", "16x32", "4x16", "4x48"]
    assert timer.groups[:3] == [near, near, rest]
    assert timer.groups[3] == ["8x32", "16x16", "16x48"]
    assert all(group[0] == "8x32" for group in timer.groups)
    assert timer.queued == [True] * len(timer.groups)
    # What ran had the tile of its name.
    for direction in gpu_tiles.DIRECTIONS:
        assert {str(tile) for ran, tile in machine.ran if ran == direction} == set(by_tile(results.tiles[0]))


@needs_emulation
def test_the_emulated_module_and_the_real_timer_agree_with_each_other() -> None:
    """Nothing is stood in for but the way in which a tile is forced; fp32, with the checks as they are."""
    machine = Machine()
    inputs = Case(TINY.workload.replace(dtype="float32")).inputs("cpu")
    forward = gpu_tiles.Direction(machine, inputs)
    assert len(forward.plans) > 20
    other = Tile(4, 16)
    assert forward.difference(other) == ""
    record: dict[str, Any] = {"case": "x", "direction": "forward", "status": "ok"}
    gpu_tiles._begin(forward, record, inputs)
    record["tiles"] = [tile for tile in record["tiles"] if tile["tile"] in (str(CHOICE), str(other))]
    gpu_tiles._time_tiles(forward, record, budget=Budget(0.0, 3, 3), deadline=float("inf"))
    assert [tile["rounds"] for tile in record["tiles"]] == [3, 3]
    assert all(0 < q1 <= median <= q3 for q1, median, q3 in (tile["seconds"] for tile in record["tiles"]))
    backward = gpu_tiles.Direction(machine, inputs, forward.codes)
    assert backward.difference(other) == ""
    # What is a little off, or not written, is seen.
    backward._expected[0] *= 1.001
    assert backward.difference(other).startswith("gradient off by 0.00")
    machine.idle = True
    assert backward.difference(other) == "gradient off by nan (relative L2)"
    assert forward.difference(other) == "terms off by nan"


@needs_emulation
def test_codes_for_backward_are_those_of_the_planners_tile(timer: Timer) -> None:
    inputs = TINY.inputs("cpu")
    forward = gpu_tiles.Direction(Machine(), inputs)
    before = forward.codes.clone()
    forward._poison()
    assert torch.equal(forward.codes, before)
    inputs.logits.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="planner's tile 8x32 gives numbers that are not finite"):
        gpu_tiles.Direction(Machine(), inputs)


@needs_emulation
def test_a_wrong_tile_gets_no_time(timer: Timer) -> None:
    results = measure(Machine(wrong=(Tile(4, 32),)))
    forward, backward = (by_tile(record) for record in results.tiles)
    assert forward["4x32"]["status"] == "wrong"
    assert forward["4x32"]["reason"] == "terms off by 0.0001"
    assert "seconds" not in forward["4x32"]
    assert backward["4x32"]["status"] == "ok"
    assert sum(tile["status"] == "ok" for tile in forward.values()) == 8
    assert results.broken()


@needs_emulation
def test_a_tile_that_fails_leaves_the_planners_choice_in_force(timer: Timer) -> None:
    machine = Machine(failing=(Tile(8, 16),))
    results = measure(machine)
    for record in results.tiles:
        failed = by_tile(record)["8x16"]
        assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no launch")
        assert record["status"] == "ok"
    assert results.broken()
    # Also behind a launch that fails where it is timed.
    with pytest.raises(RuntimeError, match="no launch"), gpu_tiles.forced(machine, Tile(8, 16)):
        raise RuntimeError("no launch")
    assert machine.forced == (0, 0)


@needs_emulation
def test_where_the_planners_own_tile_fails_the_other_workloads_go_on(timer: Timer) -> None:
    machine = Machine()
    whole = machine.cuda_forward

    def first_fails(params: Any, *rest: Any) -> None:
        if params.classes == 3:
            raise RuntimeError("no such kernel")
        whole(params, *rest)

    machine.cuda_forward = first_fails  # type: ignore[method-assign]
    results = measure(machine, TINY, OTHER)
    states = [(record["status"], record.get("reason", "")) for record in results.tiles]
    assert states == [
        ("failed", "RuntimeError: no such kernel"),
        ("skipped", "forward failed, so there are no codes"),
        ("ok", ""),
        ("ok", ""),
    ]


@needs_emulation
def test_a_lost_device_ends_the_measurement_and_is_said(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: str, after: str) -> None:
        raise gpu_tiles.DeviceLost(f"the device works no longer in this process; the last error before was {after}")

    monkeypatch.setattr(gpu_tiles, "_assert_alive", lost)
    saved: list[int] = []
    machine = Machine(failing=(Tile(8, 16),), error="an illegal memory access")
    results = measure(machine, TINY, OTHER, save=lambda r: saved.append(len(r.notes)))
    assert [record["status"] for record in results.tiles] == ["failed", "ok"]
    assert "tile 8x16: RuntimeError: an illegal memory access" in results.notes[0]
    assert saved[-1] == len(results.notes)
    assert results.broken()


@needs_emulation
def test_what_the_module_refuses_is_listed_with_the_reason(timer: Timer) -> None:
    refused = Case(TINY.workload.replace(proxy="deep", dtype="float32"))
    results = measure(Machine(), refused)
    assert timer.groups == []
    for record in results.tiles:
        assert record["status"] == "skipped"
        assert "float16 and bfloat16 logits alone" in record["reason"]
    assert not results.broken()
    assert results.notes == []


@needs_emulation
def test_a_run_that_is_cut_short_has_the_neighbours_and_names_the_rest(timer: Timer) -> None:
    saves: list[str] = []
    # Each group takes a second of this clock: 4 groups near the choices, then the rest of the first workload begins.
    results = measure(Machine(), TINY, OTHER, deadline=7.5, save=lambda found: saves.append(json.dumps(vars(found))))
    for record in results.tiles:
        done = [tile["tile"] for tile in record["tiles"] if tile["status"] == "ok"]
        assert done[:4] == ["8x32", "4x32", "8x16", "8x48"]
        assert "final" not in record["tiles"][0] or "untimed" not in [tile["status"] for tile in record["tiles"]]
    assert f"{OTHER.name}: all other tiles left out, the time was up" in results.notes
    assert f"{OTHER.name}, forward: 5 of 9 tiles left out, the time was up" in results.notes
    assert json.loads(saves[-1])["notes"] == results.notes
    assert len(saves) >= 5
    # What decides between the backends was there before the first tile.
    first, second = (json.loads(saved) for saved in saves[:2])
    assert ([r["case"] for r in first["comparisons"]], first["tiles"]) == ([TINY.name], [])
    assert ([r["case"] for r in second["comparisons"]], second["tiles"]) == ([TINY.name, OTHER.name], [])
    none = measure(Machine(), TINY, deadline=timer.now)
    assert none.tiles == []
    assert len(none.notes) == 3


def stand_in(scale: float, error: Exception | None = None) -> Contender:
    def make(inputs: Inputs, compiler: str) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            if error is not None:
                raise error
            return scale * logits.float().square().mean()

        return loss

    return Contender("x", "x", "nchw", "x", False, "half", True, make)


def compared(
    monkeypatch: pytest.MonkeyPatch, timer: Timer, cuda: Contender, triton: Contender, dtype: str = "bfloat16"
) -> dict[str, Any]:
    monkeypatch.setattr(gpu_tiles, "contenders", lambda device: {"cuda": cuda, "triton": triton})
    record: dict[str, Any] = {"status": "ok"}
    gpu_tiles._compare(Case(TINY.workload.replace(dtype=dtype)), "cpu", Budget(0.0), record)
    return record


def test_backends_are_compared_idle_and_queued(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.seconds = {"cuda": 0.002, "triton": 0.005}
    record = compared(monkeypatch, timer, stand_in(1.0), stand_in(1.0))
    assert record["status"] == "ok"
    assert timer.queued == [False, True]
    for number, measured in enumerate(("idle", "queued"), start=1):
        assert record[measured]["gain"] == pytest.approx([2.5] * 3)
        assert record[measured]["seconds"][1] == pytest.approx(number * 0.002)
        assert record[measured]["triton"][1] == pytest.approx(number * 0.005)


def test_backends_that_disagree_refuse_or_fail_get_no_time(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    record = compared(monkeypatch, timer, stand_in(1.0), stand_in(1.1))
    assert record["status"] == "wrong"
    assert "cuda and triton differ: loss by 0.09" in record["reason"]
    # fp32 is held to more than bf16.
    assert compared(monkeypatch, timer, stand_in(1.0), stand_in(1.0001), "float32")["status"] == "wrong"
    assert compared(monkeypatch, timer, stand_in(1.0), stand_in(1.0001))["status"] == "ok"
    timer.groups.clear()
    refusal = ValueError("backend 'cuda' cannot do this: too wide; use backend='auto' or 'reference'")
    record = compared(monkeypatch, timer, stand_in(1.0, refusal), stand_in(1.0))
    assert (record["status"], "too wide" in record["reason"]) == ("skipped", True)
    record = compared(monkeypatch, timer, stand_in(1.0), stand_in(1.0, RuntimeError("out of memory")))
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: out of memory")
    assert timer.groups == []


def test_a_backend_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tiles, "contenders", lambda device: {"cuda": stand_in(1.0)})
    record: dict[str, Any] = {"status": "ok"}
    gpu_tiles._compare(TINY, "cpu", Budget(0.0), record)
    assert record["status"] == "skipped"
    assert record["reason"].startswith("triton: ")
    assert len(record["reason"]) > 12


def test_exit_codes_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tiles.machine, "describe", lambda device: {"gpu": DEVICE})
    monkeypatch.setattr(gpu_tiles.gpu_bench, "label_kind", lambda: ("random", ""))
    monkeypatch.setattr(cuda_ops, "why_unavailable", lambda: "it was not built")
    arguments = ["--output", str(tmp_path), "--limit", "9"]
    assert gpu_tiles.main(arguments) == 0
    data = json.loads((tmp_path / gpu_tiles.RESULTS).read_text())
    assert data["machine"] == {"gpu": DEVICE}
    assert data["notes"] == ["no tile was timed: it was not built"]
    monkeypatch.setattr(cuda_ops, "why_unavailable", lambda: None)
    found = gpu_tiles.Results()

    def measured(cases: Any, module: Any, device: str, *, deadline: float, save: Any) -> gpu_tiles.Results:
        assert device == "cuda"
        assert 0 < deadline - time.monotonic() <= 9
        save(found)
        return found

    monkeypatch.setattr(gpu_tiles, "measure", measured)
    for notes, comparisons, code in (
        ([], [], gpu.OK),
        (["x left out, the time was up"], [], gpu.CUT_SHORT),
        (["x left out, the time was up"], [{"status": "wrong"}], gpu.FAILED),
        ([], [{"status": "skipped"}], gpu.OK),
    ):
        found.notes, found.comparisons = notes, comparisons
        assert gpu_tiles.main(arguments) == code
        assert json.loads((tmp_path / gpu_tiles.RESULTS).read_text())["notes"] == notes


def recorded() -> gpu_tiles.Results:
    def tile(name: str, seconds: float, gain: float, **more: Any) -> dict[str, Any]:
        times = {"seconds": [0.9 * seconds, seconds, 1.1 * seconds], "gain": [gain - 0.01, gain, gain + 0.01]}
        return {"tile": name, "status": "ok", **times, **more}

    bad = {"tile": "2x16", "status": "wrong", "reason": "terms off by 0.1"}
    forward = [tile("8x32", 0.002, 1.0), tile("16x32", 0.0016, 1.25), bad, {"tile": "4x16", "status": "untimed"}]
    backward = [tile("8x32", 0.001, 1.0, final=True), tile("4x32", 0.002, 0.5, final=True), tile("4x48", 0.0005, 2.0)]
    backward[2]["final"] = False
    labels, ok = {"source": "scenes", "edge_share": 0.031}, {"status": "ok", "planner": "8x32"}
    found = {"seconds": [0.001, 0.002, 0.003], "triton": [0.004, 0.005, 0.006], "gain": [2.4, 2.5, 2.6]}
    return gpu_tiles.Results(
        [
            {"case": "voc", "direction": "forward", "labels": labels, **ok, "tiles": forward},
            {"case": "voc", "direction": "backward", "labels": {**labels, "edge_share": 0.25}, **ok, "tiles": backward},
            {"case": "deep", "direction": "forward", "status": "skipped", "reason": "it does not fit"},
        ],
        [
            {"case": "voc", "status": "ok", "idle": {**found, "gain": [0.8, 0.9, 1.0]}, "queued": found},
            {"case": "deep", "status": "skipped", "reason": "too deep"},
        ],
        ["a note of the tiles"],
    )


def test_the_report_says_how_far_the_planner_is_from_the_best(tmp_path: Path) -> None:
    gpu_tiles.write(tmp_path, {"gpu": DEVICE}, recorded())
    assert gpu_report.main([str(tmp_path)]) == 0
    text = (tmp_path / gpu_report.REPORT).read_text()
    assert "The planner's choice is within 25.0 % of the best; furthest off: forward of voc." in text
    assert "Labels: scenes; 3.1 to 25.0 % of the pixels lie at an edge." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows.count(["deep", "forward", "it does not fit", *[""] * 6]) == 1
    forward = next(row for row in rows if row[:2] == ["voc", "forward"])
    assert forward[2:] == [
        "8x32",
        "2.00 [1.80, 2.20]",
        "16x32",
        "1.60 [1.44, 1.76]",
        "1.25x [1.24, 1.26]",
        "16x32 1.25x, 8x32 1.00x",
        "2 of 4",
    ]
    # The finals decide: 4x48 only looked fast before them.
    backward = next(row for row in rows if row[:2] == ["voc", "backward"])
    assert backward[4] == "8x32"
    assert backward[7] == "8x32 1.00x, 4x32 0.500x"
    assert "* forward of voc, tile 2x16: WRONG: terms off by 0.1" in text
    assert "* a note of the tiles" in text
    assert "## cuda against triton" in text
    assert "in 1 of 1 workloads" in text
    compared = next(row for row in rows if row[0] == "voc")
    assert compared[1:4] == ["2.00 [1.00, 3.00]", "5.00 [4.00, 6.00]", "0.900x [0.800, 1.00]"]
    assert compared[6] == "2.50x [2.40, 2.60]"
    assert ["deep", "too deep", *[""] * 5] in rows
    # Another device's part in the same folder is refused.
    (tmp_path / gpu.SESSION).write_text(json.dumps({"machine": {"gpu": "another"}}))
    assert gpu_report.main([str(tmp_path)]) == 2


def test_a_report_without_any_tile() -> None:
    header, rows = gpu_report.tile_table([])
    assert (len(header), rows) == (9, [])
    record = {"case": "voc", "direction": "forward", "status": "ok", "tiles": [{"tile": "8x32", "status": "untimed"}]}
    assert gpu_report.tile_table([record])[1] == [["voc", "forward", "not timed", *[""] * 6]]
    assert "a note" in gpu_report._tiles({"tiles": [], "comparisons": [], "notes": ["a note"]})
