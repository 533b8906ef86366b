"""The tiles of the CUDA kernels on the device at hand: the planner's choice against every other tile that fits, and the
backend "cuda" against "triton", which decides the order that "auto" takes.

A tile is rows x width of its hidden rows, as csrc/cuda/plan.cpp searches them. A direction (forward, backward) is timed
as it is queued in training: packing of the weights, the kernel, the final sums. A tile whose results differ from those
of the planner's tile is "wrong" and gets no time. The planner's choice is timed in every group of tiles, interleaved
with them, so each tile's gain comes from rounds of its own group. For a run that is cut short the comparison of the
backends comes first, for all workloads, then the neighbours of the choice; the fastest tiles are at last timed once
more, together.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends import registry as backends
from semeda_fast.backends.config import config_text, parse_config
from semeda_fast.backends.native import cuda_module, span
from semeda_fast.backends.params import add_gradients, fill
from semeda_fast.backends.problem import Problem
from semeda_fast.files import atomic_path

from .. import machine, oracle, timing
from ..contenders import Contender, contenders
from ..suite.worker import first_line
from ..timing import Budget, quartiles
from ..workloads import Inputs
from . import bench as gpu_bench
from .workloads import Case, all_cases, spec_of

RESULTS = "tiles.json"
SCHEMA = 1
CUT_SHORT = 4
ROWS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # plan.cpp, search_tile
WIDTHS = (16, 32, 48, 64, 80)
DIRECTIONS = ("forward", "backward")
BACKENDS = ("cuda", "triton")
MEASURES = {"idle": False, "queued": True}
GROUP = 8  # tiles that are timed together with the planner's
TOP = 5
LEAST = 3.0  # seconds without which no workload is begun
LEAST_GROUP = 1.0
# Sums of fp32 in the order of the tiles; a pixel's own values do not depend on its tile, or by a rounding at most.
TERMS, CODES, GRADIENT = 5e-6, 1e-5, 1e-4


class Tile(NamedTuple):
    """Rows of a tile, and pixels of its hidden rows."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"


@contextlib.contextmanager
def forced(module: Any, tile: Tile | None) -> Iterator[None]:
    """Plans and launches take this tile, or the planner's own for None; the planner's again behind it, always."""
    try:
        module.force_tile(*(tile or (0, 0)))
        yield
    finally:
        module.force_tile(0, 0)


class Direction:
    """One direction of one workload: its tiles, and launches without what Python adds around them.

    Attributes:
        planned: the planner's choice.
        plans: every tile that fits, the planner's first, then by distance from it; what `plan` says of each.
        codes: what forward writes for backward.

    Raises:
        RuntimeError: the module does not run the workload, or gives no finite numbers.
    """

    def __init__(self, module: Any, inputs: Inputs, codes: Tensor | None = None) -> None:
        """Backward where `codes` are given, else forward."""
        self.backward = codes is not None
        self._module, self.device = module, inputs.logits.device
        self._index = self.device.index or 0
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        flat = torch.cat([t.detach().reshape(-1).float() for t in (*inputs.proxy.weights, *inputs.proxy.biases)])
        config = parse_config(config_text(inputs.proxy.weights, spec_of(inputs), False))
        self._problem = Problem(inputs.logits, inputs.target, None, None, flat, config)
        self._params, self._keep = fill(module, self._problem)
        new = inputs.logits.new_empty
        if codes is None:
            codes = new(module.code_bytes(self._params), dtype=torch.uint8)
            terms, counts = new(3 + len(config.sizes), dtype=torch.float32), new(2, dtype=torch.int64)
            self._params.terms, self._params.counts = span(terms), span(counts)
            self._outputs = [terms, counts, codes]
        else:
            upstream, d_logits = new((), dtype=torch.float32).fill_(1), torch.empty_like(inputs.logits)
            self._keep.append(upstream)
            add_gradients(module, self._params, upstream, upstream, d_logits)
            self._outputs = [d_logits]
        self._params.codes = span(codes)
        found = self._plan(None)
        self.planned = Tile(found["rows"], found["width"])
        self.plans = {self.planned: found}
        for tile in sorted((Tile(rows, width) for rows in ROWS for width in WIDTHS), key=self._distance):
            with contextlib.suppress(RuntimeError):  # it does not fit
                self.plans.setdefault(tile, self._plan(tile))
        self._workspace = new(max(plan["workspace"] for plan in self.plans.values()), dtype=torch.uint8)
        self._poison()
        self.step(self.planned)()
        self._expected = [output.clone() for output in self._outputs]
        if not bool(self._expected[0].isfinite().all()):
            raise RuntimeError(f"the planner's tile {self.planned} gives numbers that are not finite")
        self.codes = codes if self.backward else self._expected[2]

    def _plan(self, tile: Tile | None) -> dict[str, int]:
        with forced(self._module, tile):
            return dict(self._module.plan(self._params, self._index, self.backward))

    def _distance(self, tile: Tile) -> tuple[int, Tile]:
        rows = ROWS.index(tile.rows) - ROWS.index(self.planned.rows)
        width = WIDTHS.index(tile.width) - WIDTHS.index(self.planned.width)
        return abs(rows) + abs(width), tile

    def step(self, tile: Tile) -> timing.Step:
        """Queues the direction with this tile."""
        run = self._module.cuda_backward if self.backward else self._module.cuda_forward
        chosen = None if tile == self.planned else tile

        def step() -> None:
            with forced(self._module, chosen):
                run(self._params, span(self._workspace), self._index, self._stream)

        return step

    def _poison(self) -> None:
        for output in (*self._outputs, self._workspace):
            output.fill_(float("nan") if output.is_floating_point() else 77)

    def difference(self, tile: Tile) -> str:
        """What this tile computes otherwise than the planner's, or "". Waits for the device."""
        self._poison()
        self.step(tile)()
        if self.backward:
            error = relative_l2(self._outputs[0], self._expected[0])
            return "" if error <= GRADIENT else f"gradient off by {error:.2g} (relative L2)"
        (terms, counts, codes), (good_terms, good_counts, good_codes) = self._outputs, self._expected
        off = float(((terms - good_terms).abs() / good_terms.abs().clamp(min=1e-30)).max())
        if not off <= TERMS:
            return f"terms off by {off:.2g}"
        if not torch.equal(counts, good_counts):
            return f"counts {counts.tolist()}, not {good_counts.tolist()}"
        share = float((codes != good_codes).sum() / max(1, codes.numel()))
        return "" if share <= CODES else f"{share:.2g} of the codes differ"


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| of [N,...], image by image, so that copies stay small; NaN where a holds one."""
    error = sum((x.float() - y.float()).square().sum(dtype=torch.float64) for x, y in zip(a, b, strict=True))
    norm = sum(y.float().square().sum(dtype=torch.float64) for y in b)
    return float((torch.as_tensor(error) / torch.as_tensor(norm)).sqrt())


class DeviceLost(RuntimeError):
    """The device refuses all work after an error: the rest of this process cannot measure anything."""


@dataclass
class Results:
    """What tiles.json holds.

    Attributes:
        tiles: a record a direction: case, direction, labels, status ("ok", "skipped", "failed"), reason, planner, and
            tiles, the planner's first. A tile's status is "untimed", "ok", "wrong" or "failed"; "ok" has seconds and
            gain (the planner's time over this tile's), both as quartiles over rounds; `final`: it was timed among the
            fastest once more.
        comparisons: a record a case: status, reason; of each measure seconds by backend and gain (triton / cuda).
        notes: what is missing, one sentence each.
    """

    tiles: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def broken(self) -> bool:
        """Whether anything was wrong or failed."""
        found = [*self.tiles, *self.comparisons, *(tile for record in self.tiles for tile in record.get("tiles", ()))]
        return any(record["status"] in ("wrong", "failed") for record in found)

    def left_out(self) -> list[str]:
        """What the clock left out."""
        counts = [(r, [t["status"] for t in r.get("tiles", ())]) for r in self.tiles]
        return [
            f"{record['case']}, {record['direction']}: {found.count('untimed')} of {len(found)} tiles left out"
            for record, found in counts
            if "untimed" in found
        ]


def measure(
    cases: Sequence[Case],
    module: Any,
    device: str,
    *,
    deadline: float = float("inf"),
    budget: Budget | None = None,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """First cuda against triton, then the neighbours of the planner's choices, then all other tiles.

    Args:
        deadline: time.monotonic() after which nothing is begun.
        budget: of a group of tiles; finals and comparisons get three times as long.
        save: called with all results so far after each direction and comparison.
    """
    budget = budget or Budget(0.3, 7, 40)
    longer = Budget(3 * budget.seconds, budget.min_rounds, 3 * budget.max_rounds)
    results, left_out = Results(), []

    def near(case: Case) -> None:
        work = functools.partial(_time_tiles, budget=budget, deadline=deadline, most=1)
        _tiles_of(case, module, device, results, work)

    def against(case: Case) -> None:
        results.comparisons.append({"case": case.name, "workload": vars(case.workload), "status": "ok"})
        _compare(case, device, longer, results.comparisons[-1])

    def rest(case: Case) -> None:
        def both(direction: Direction, record: dict[str, Any]) -> None:
            _time_tiles(direction, record, budget=budget, deadline=deadline)
            _time_finals(direction, record, longer)

        _tiles_of(case, module, device, results, both)

    stages = {"cuda against triton": against, "tiles near the planner's": near, "all other tiles": rest}
    try:
        for title, stage in stages.items():
            for case in cases:
                if deadline - time.monotonic() < LEAST:
                    left_out.append(f"{case.name}: {title} left out")
                    continue
                print(f"  {case.name}: {title}", file=sys.stderr, flush=True)
                stage(case)
                save(results)
    except DeviceLost as error:
        results.notes.append(str(error))
    results.notes += [f"{text}, the time was up" for text in (*left_out, *results.left_out())]
    save(results)
    return results


def _tiles_of(
    case: Case, module: Any, device: str, results: Results, work: Callable[[Direction, dict[str, Any]], None]
) -> None:
    """Do some work on both directions of a case, whose records are begun where there are none yet."""
    records = [record for record in results.tiles if record["case"] == case.name]
    if not records:
        records = [{"case": case.name, "direction": name, "status": "ok"} for name in DIRECTIONS]
        results.tiles += records
    codes = None
    for record in records:
        if record["status"] != "ok":
            continue
        try:
            inputs = case.inputs(device)
            reason = backends.get("cuda").refusal(inputs.logits, inputs.target, inputs.proxy.weights, spec_of(inputs))
            if codes is None and record["direction"] == "backward":
                reason = reason or "forward failed, so there are no codes"
            if reason:
                record.update(status="skipped", reason=reason)
                continue
            direction = Direction(module, inputs, codes)
            codes = direction.codes
            _begin(direction, record, inputs)
            work(direction, record)
        except Exception as error:  # the other workloads are worth having all the same
            record.update(status="failed", reason=first_line(error))
            if isinstance(error, DeviceLost):
                raise
            _assert_alive(device, f"{case.name}, {record['direction']}: {record['reason']}")


def _begin(direction: Direction, record: dict[str, Any], inputs: Inputs) -> None:
    if "tiles" in record:
        return
    facts = inputs.facts
    record["workload"] = vars(inputs.workload)
    record["labels"] = {"source": facts.source, "edge_share": facts.edge_share}
    record["planner"] = str(direction.planned)
    record["tiles"] = [
        {"tile": str(tile), "status": "untimed", **{key: plan[key] for key in sorted(plan) if key != "tiles"}}
        for tile, plan in direction.plans.items()
    ]


def _time_tiles(
    direction: Direction, record: dict[str, Any], *, budget: Budget, deadline: float, most: int | None = None
) -> None:
    """Check and time tiles that were not yet, `most` groups of them, each interleaved with the planner's."""
    waiting = [tile for tile in record["tiles"][1:] if tile["status"] == "untimed"]
    groups = [waiting[at : at + GROUP] for at in range(0, len(waiting), GROUP)]
    if not groups and record["tiles"][0]["status"] == "untimed":
        groups = [[]]  # no other tile fits
    for group in groups[:most]:
        if deadline - time.monotonic() < LEAST_GROUP:
            return
        where = f"{record['case']}, {record['direction']}"
        _time_group(direction, record, [found for found in group if _checked(direction, found, where)], budget)


def _checked(direction: Direction, found: dict[str, Any], where: str) -> bool:
    """Whether a tile computes what the planner's does; else its record says what is the matter."""
    try:
        problem = direction.difference(_tile(found))
    except Exception as error:
        found.update(status="failed", reason=first_line(error))
        _assert_alive(direction.device.type, f"{where}: tile {found['tile']}: {found['reason']}")
        return False
    if problem:
        found.update(status="wrong", reason=problem)
    return not problem


def _assert_alive(device: str, after: str) -> None:
    """An illegal access, for one, ends a process's use of a device."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.ones(1, device=device).sum().item()
    except Exception as error:
        raise DeviceLost(f"the device works no longer in this process; the last error before was {after}") from error


def _time_group(direction: Direction, record: dict[str, Any], group: Sequence[dict[str, Any]], budget: Budget) -> None:
    timed = {tile["tile"]: tile for tile in (record["tiles"][0], *group)}
    steps = {name: direction.step(_tile(tile)) for name, tile in timed.items()}
    samples = timing.interleaved(steps, budget, device=direction.device.type, warmup=1, queued=True)
    for name, tile in timed.items():
        tile.update(status="ok", **_gain(samples[record["planner"]].seconds, samples[name].seconds))


def _gain(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """Quartiles of `fast`, and of slow / fast round by round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"seconds": list(quartiles(fast)), "gain": list(quartiles(ratios)), "rounds": len(ratios)}


def _time_finals(direction: Direction, record: dict[str, Any], budget: Budget) -> None:
    """Time the fastest tiles once more: the best of many looks better than it is."""
    if any(tile["status"] == "untimed" for tile in record["tiles"]):
        return
    others = [tile for tile in ranked(record) if tile["tile"] != record["planner"]][:TOP]
    _time_group(direction, record, others, budget)
    for tile in record["tiles"]:
        tile["final"] = tile in others or tile["tile"] == record["planner"]


def ranked(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The tiles that were timed, fastest first; of the finals alone where there were some."""
    timed = [tile for tile in record.get("tiles", ()) if tile["status"] == "ok"]
    finals = [tile for tile in timed if tile.get("final")]
    return sorted(finals or timed, key=lambda tile: -tile["gain"][1])


def _tile(found: dict[str, Any]) -> Tile:
    return Tile(found["rows"], found["width"])


def _compare(case: Case, device: str, budget: Budget, record: dict[str, Any]) -> None:
    """Forward and backward of the whole loss on both backends, NCHW, interleaved; they have to agree before."""
    known = contenders(device)
    for name in BACKENDS:
        if name not in known:
            reason = backends.get(name).why_unavailable() or f"it is not measured on {device}"
            record.update(status="skipped", reason=f"{name}: {reason}")
            return
    try:
        inputs = case.inputs(device)
        steps, found = {}, []
        for name in BACKENDS:
            steps[name], *values = _first_call(known[name], inputs)
            found.append(values)
        reason = _disagreement(found, case.workload.dtype)
        if reason:
            record.update(status="wrong", reason=reason)
            return
        for measured, queued in MEASURES.items():
            taken = timing.interleaved(steps, budget, device=device, warmup=2, queued=queued)
            cuda, triton = (taken[name].seconds for name in BACKENDS)
            record[measured] = {"triton": list(quartiles(triton)), **_gain(triton, cuda)}
    except Exception as error:
        refused = isinstance(error, ValueError) and "cannot do this" in str(error)  # of backends.choose
        record.update(status="skipped" if refused else "failed", reason=first_line(error))
        if not refused:
            _assert_alive(device, f"{case.name}: {record['reason']}")


def _first_call(contender: Contender, inputs: Inputs) -> tuple[timing.Step, float, Tensor]:
    function, leaf = contender.make(inputs, "inductor"), inputs.leaf(contender.layout)
    loss = function(leaf, inputs.target)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, inputs.workload.grad_scale))
    step = timing.make_step(function, leaf, inputs.target, "fwdbwd", inputs.workload.grad_scale)
    return step, float(loss.detach()), gradient


def _disagreement(found: Sequence[Sequence[Any]], dtype: str) -> str:
    """Whether two backends are farther apart than each may be from the reference; bench.py compares with that."""
    (loss, gradient), (other_loss, other_gradient) = found
    off = abs(loss - other_loss) / abs(other_loss)
    error = relative_l2(gradient, other_gradient)
    if off <= 2 * oracle.LOSS[dtype] and error <= 2 * max(oracle.GRADIENT[dtype], oracle.OVERALL):
        return ""
    return f"{' and '.join(BACKENDS)} differ: loss by {off:.2g}, gradient by {error:.2g} (relative L2)"


def write(folder: Path, facts: dict[str, Any], results: Results) -> Path:
    """Replace tiles.json in one step."""
    path = folder / RESULTS
    data = {"schema": SCHEMA, "machine": facts, **vars(results)}
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1: something was wrong or failed; 4: the time was up before all was measured."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tiles", description="The tiles of make gpu.")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"{RESULTS} in it is replaced")
    made.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    options = made.parse_args(arguments)
    deadline = time.monotonic() + options.limit
    labels, note = gpu_bench.label_kind()
    facts = machine.describe("cuda")
    reason = cuda_ops.why_unavailable()
    if reason:
        results = Results(notes=[f"no tile was timed: {reason}"])
        write(options.output, facts, results)
    else:

        def save(results: Results) -> None:
            write(options.output, facts, results)

        results = measure(all_cases(labels), cuda_module(), "cuda", deadline=deadline, save=save)
    for text in (note, *results.notes):
        if text:
            print(f"  note: {text}", file=sys.stderr)
    if results.broken():
        return 1
    return CUT_SHORT if any("the time was up" in text for text in results.notes) else 0


if __name__ == "__main__":
    sys.exit(main())
