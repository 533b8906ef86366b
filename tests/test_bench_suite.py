"""The benchmark suite end to end: a miniature run with a right and a wrong backend, reports, comparison, pytest."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from semeda_fast import SemedaLoss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as command_line
from benchmarks.contenders import contenders
from benchmarks.report import compare, report, tables
from benchmarks.suite import plans, runner, worker
from benchmarks.suite.plans import Case, Plan
from benchmarks.suite.runner import Run
from benchmarks.timing import Budget, Samples
from benchmarks.workloads import HEADLINE, named

ROOT = Path(__file__).resolve().parent.parent
# Two backends that any process can import: one that is the reference under another name, and one that is not.
BACKENDS = """
from semeda_fast.backends import registry as backends, reference

def wrong(*arguments):
    terms = reference.loss_terms(*arguments)
    return terms._replace(semeda=1.01 * terms.semeda)

backends.register(backends.Backend("stand_in", reference.loss_terms, ("cpu",)))
backends.register(backends.Backend("off_by_one_percent", wrong, ("cpu",)))
"""


# The groups of `pytest benchmarks/` on small images for a moment: what is tested goes the same way as their samples.
SMALL_GROUPS = """
from dataclasses import replace
from benchmarks.suite import groups
from benchmarks.timing import Budget

def small(made=groups.groups):
    return [replace(g, workload=g.workload.replace(height=128, width=128), budget=Budget(0.5, 5, 9)) for g in made()]

groups.groups = small
"""


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores SIGINT for what it starts in the background, and children would, too.
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The folder, exit code and stderr of a whole miniature run with both backends."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "bench_test_backends.py").write_text(BACKENDS)
    arguments = ["run", "--smoke", "--threads", "1", "--output", "out", "--import", "bench_test_backends"]
    process = start(arguments, folder)
    _, errors = process.communicate(timeout=280)
    return folder / "out", process.returncode, errors


@pytest.fixture(scope="module")
def run(smoke: tuple[Path, int, str]) -> Run:
    return runner.load_run(smoke[0])


def test_a_wrong_backend_gets_no_time_and_fails_the_run(smoke: tuple[Path, int, str], run: Run) -> None:
    _, code, errors = smoke
    assert code == 1
    assert "WRONG OR FAILED: `off_by_one_percent`" in errors
    timed = [record for record in run.records if record["kind"] == "time"]
    wrong = [record for record in timed if record["family"] == "off_by_one_percent"]
    assert len(wrong) > 20
    assert {record["status"] for record in wrong} == {"wrong"}
    assert not any("seconds" in record for record in wrong)
    assert all("loss off by" in record["reason"] for record in wrong)
    others = [record for record in timed if record["family"] != "off_by_one_percent"]
    assert {record["status"] for record in others} == {"ok"}, [r["reason"] for r in others if r["status"] != "ok"]


def test_everything_was_run(run: Run) -> None:
    assert run.complete
    assert {plan["state"] for plan in run.plans} == {"done"}
    suites = {record["suite"] for record in run.records}
    axes = {f"scaling-{axis}" for axis in report.SCALING_AXES}
    assert suites == {"machine", "headline", "workloads", "memory", "steps", *axes}
    headline = [r for r in run.records if r["suite"] == "headline" and r["workload"]["dtype"] == "float32"]
    assert {r["contender"] for r in headline} >= set(contenders()) | {"stand_in", "stand_in_cl"}
    allocators = {"default"} if runner.tuned_reason() else {"default", "tuned"}
    assert {r["allocator"] for r in headline} == allocators
    assert {r["mode"] for r in run.records if r["kind"] == "time"} == {"nograd", "forward", "fwdbwd"}


def test_a_result_says_what_it_was_measured_with(run: Run) -> None:
    for record in run.records:
        if record["kind"] != "time":
            continue
        assert record["labels"]["source"] in ("camvid", "scenes", "random")
        assert 0 <= record["labels"]["edge_share"] <= 1
        assert record["threads"] == 1
        if record["status"] == "ok":
            assert len(record["seconds"]) >= 3
            assert all(value > 0 for value in record["seconds"])
            assert record["check"]["ok"]
            assert record["check"]["gradient_error"] <= record["check"]["gradient_tolerance"]
            if record["mode"] == "fwdbwd":
                assert record["saved_bytes_per_pixel"] > 0
    groups = tables.groups(run.records, "")
    for records in groups.values():  # samples of one group are pairs
        assert len({len(r["seconds"]) for r in records if r["status"] == "ok"}) == 1
    peaks = next(r for r in run.records if r["kind"] == "peaks")
    assert peaks["fma_flops"] > 1e8
    assert peaks["copy_bytes"] > 1e8
    assert peaks["fma_how"]


def test_the_report_shows_times_wrong_ones_and_plots(smoke: tuple[Path, int, str], run: Run) -> None:
    folder = smoke[0]
    text = (folder / report.REPORT).read_text()
    assert "## Wrong or failed" in text
    assert "WRONG: loss off by 0.0" in text
    row = next(line for line in text.splitlines() if line.startswith("| semeda_fast stand_in (`stand_in`)"))
    assert " [" in row
    assert "WRONG" not in row
    assert "| reference eager / stand_in |" in text
    assert not any(line.startswith("| reference eager / off_by_one_percent") for line in text.splitlines())
    for heading in (
        "## Machine",
        "## Headline workload",
        "## Workloads",
        "## Memory",
        "## Work",
        "## Training steps",
        "## Caveats",
    ):
        assert f"\n{heading}\n" in text
    assert run.machine["processor"] in text
    pictures = {path.name for path in folder.glob("*.png")}
    shown = {line.split("(")[-1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert shown == pictures
    assert len(pictures) >= 7
    assert "nan" not in text.lower().split()
    assert str(ROOT) not in text
    assert str(folder) not in text


def test_the_report_can_be_written_again_elsewhere(smoke: tuple[Path, int, str], tmp_path: Path) -> None:
    assert command_line.main(["report", str(smoke[0]), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / report.REPORT).read_text() == (smoke[0] / report.REPORT).read_text()


def changed(run: Run, contender: str, factor: float) -> Run:
    """A copy of a run in which one contender took `factor` times as long."""
    other = copy.deepcopy(run)
    for record in other.records:
        if record["kind"] in compare.TIMED and record["contender"] == contender and record["status"] == "ok":
            record["seconds"] = [factor * value for value in record["seconds"]]
    return other


def test_compare_finds_what_changed_and_nothing_else(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.differences(run, run) == []
    same = compare.changes(run, run)
    assert len(same) > 50
    assert all(change.ratio.value == 1 and change.verdict(0.0) == "" for change in same)

    slow = changed(run, "stand_in", 10.0)
    found = {change.key for change in compare.changes(run, slow) if change.verdict(0.03) == "slower"}
    assert found == {c.key for c in same if c.key[-1] == "stand_in"}
    for name, one in (("old", run), ("new", slow)):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    assert command_line.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    printed = capsys.readouterr().out
    assert "slower" in printed
    assert "faster" not in printed
    assert "controls" in printed
    assert command_line.main(["compare", str(tmp_path / "new"), str(tmp_path / "old")]) == 0
    assert "faster" in capsys.readouterr().out


def test_compare_warns_of_another_machine_and_of_what_became_wrong(run: Run) -> None:
    other = copy.deepcopy(run)
    other.machine.update(processor="another", threads=7, torch="9.9")
    victim = next(r for r in other.records if r["kind"] == "time" and r["contender"] == "stand_in")
    victim.update(status="wrong", reason="loss off by 1")
    text, worse = compare.describe(run, other, 0.03)
    assert worse
    for name in ("processor", "threads", "torch"):
        assert f"WARNING: {name}: " in text
    assert "NOW WRONG: " in text


def test_compare_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text("{}")
    assert command_line.main(["compare", str(path), str(path)]) == 2
    assert "expected results of schema 1, got None" in capsys.readouterr().err
    path.write_text("no json")
    assert command_line.main(["report", str(path)]) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert command_line.main(["report", str(tmp_path / "missing.json")]) == 2


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to one process is POSIX")
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    arguments = ["run", "--smoke", "--threads", "1", "--output", "out", "--only", "machine|memory-ce|workloads"]
    process = start(arguments, tmp_path)
    results = tmp_path / "out" / runner.RESULTS
    deadline = time.monotonic() + 60
    while not results.is_file():  # written after the first plan
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    kept = runner.load_run(results)
    assert not kept.complete
    assert kept.plans[0]["state"] == "done"
    assert kept.plans[-1]["state"] == "interrupted"
    assert any(record["kind"] == "peaks" for record in kept.records)
    assert "not complete" in (tmp_path / "out" / report.REPORT).read_text()


def test_time_that_is_up_leaves_plans_out_visibly(tmp_path: Path) -> None:
    run = Run("smoke", "", {**runner.machine.describe("cpu"), "device": "cpu", "threads": 1})
    runner.run_plans([Plan("one", ()), Plan("two", ())], run, tmp_path, limit=0.0)
    assert [plan["state"] for plan in run.plans] == ["left out", "left out"]
    assert not runner.load_run(tmp_path).complete


@pytest.mark.parametrize("which", plans.SETS)
def test_plans_survive_json_and_have_names_of_their_own(which: str) -> None:
    made = plans.make_plans(which, device="cpu", threads=4, fused=("cpu", "cpu_cl"))
    assert len({plan.name for plan in made}) == len(made)
    for plan in made:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        kinds = {case.kind for case in plan.cases}
        assert len(kinds) == 1
        if kinds <= {"memory", "step-memory"}:
            assert len(plan.cases[0].contenders) == 1  # a process of its own
    assert not any(p.allocator == "tuned" for p in plans.make_plans(which, device="cuda", threads=4, fused=()))


def test_the_full_set_holds_what_it_promises() -> None:
    made = plans.make_plans("full", device="cpu", threads=4, fused=("cpu",))
    cases = [(plan, case) for plan in made for case in plan.cases]
    timed = [(p.allocator, c.workload) for p, c in cases if c.suite == "workloads" and c.workload is not None]
    for allocator in plans.ALLOCATORS:
        covered = {(w.dataset, w.proxy, w.dtype) for a, w in timed if a == allocator}
        assert len(covered) == 5 * 3 * 3
    pixels = {c.workload.height for _, c in cases if c.suite == "scaling-pixels" and c.workload is not None}
    assert pixels == {64, 128, 256, 512, 1024, 2048}
    classes = {c.workload.logit_channels for _, c in cases if c.suite == "scaling-classes" and c.workload is not None}
    assert {min(classes), max(classes)} == {1, 256}
    assert {c.threads for _, c in cases if c.suite == "scaling-threads"} == {1, 2, 3, 4}
    headline = {name for _, c in cases if c.suite == "headline" for name in c.contenders}
    assert headline == {name for name, c in contenders().items() if not c.fused} | {"fused"}


def test_each_allocator_gets_its_environment_and_nothing_of_anothers() -> None:
    base = {"MALLOC_ARENA_MAX": "7", "GLIBC_TUNABLES": "x", "PATH": "p", "MALLOC_PERTURB_": "3"}
    plan = Plan("x", (Case("peaks", "machine", 3),))
    default = runner.worker_environment(plan, base)
    assert not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in default)
    assert default["OMP_NUM_THREADS"] == "3"
    assert default["PATH"] == "p"
    tuned = runner.worker_environment(Plan("x", plan.cases, "tuned"), base)
    assert {name for name in tuned if name.startswith("MALLOC_")} == set(runner.TUNED)
    assert tuned["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.skipif(bool(runner.tuned_reason()), reason=runner.tuned_reason())
def test_the_tuned_allocator_saves_page_faults() -> None:
    """Above 32 MB glibc maps each tensor and unmaps it when it is freed, unless it is told not to."""
    code = (
        "import torch\n"
        "from benchmarks.timing import Budget, interleaved\n"
        "step = lambda: torch.ones(10 * 2**20)\n"
        "faults = interleaved({'step': step}, Budget(0.0, 9, 9), warmup=10)['step'].faults\n"
        "print(sorted(faults)[4])\n"
    )
    faults = {}
    for allocator in plans.ALLOCATORS:
        child = runner.worker_environment(Plan("faults", (), allocator))
        result = subprocess.run([sys.executable, "-c", code], env=child, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        faults[allocator] = int(result.stdout)
    assert faults["tuned"] < 10
    assert faults["default"] >= 20  # 40 MB are 10240 small pages, or 20 of 2 MB where the system gives those


def test_a_bad_call_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["run", "--smoke", "--only", "nothing-like-it"]) == 2
    assert "no plan of the smoke set matches 'nothing-like-it'; --list shows them" in capsys.readouterr().err
    assert command_line.main(["run", "--threads", "-1"]) == 2
    assert command_line.main(["run", "--quick", "--list"]) == 0
    assert "headline-float32-default" in capsys.readouterr().out


def test_a_worker_that_fails_is_a_failed_plan_and_not_the_end(tmp_path: Path) -> None:
    case = Case("time", "headline", 1, HEADLINE.replace(batch=1, height=8, width=8), ("nobody",))
    run = Run("smoke", "", {**runner.machine.describe("cpu"), "device": "cpu", "threads": 1})
    runner.run_plans([Plan("bad", (case,)), Plan("empty", ())], run, tmp_path)
    assert [plan["state"] for plan in run.plans] == ["failed", "done"]
    assert not run.complete


def test_what_a_fused_backend_leaves_to_others_is_skipped_and_no_failure() -> None:
    criterion = SemedaLoss(num_classes=2, backend="cpu")
    with pytest.raises(ValueError, match="cannot do this") as refused:
        criterion(torch.zeros((1, 2, 3, 3), dtype=torch.float64), torch.zeros((1, 3, 3), dtype=torch.int64))
    ours, plain = contenders()["cpu"], contenders()["reference"]
    left = worker._failure(ours, refused.value)
    assert left["status"] == "skipped"
    assert "the logits are float64" in left["reason"]
    assert worker._failure(plain, refused.value)["status"] == "failed"
    assert worker._failure(ours, ValueError("anything else"))["status"] == "failed"


def test_who_convolves_in_tf32_is_judged_as_under_autocast() -> None:
    """TF32 is on for half-precision logits on CUDA alone, and fused backends do not ask cuDNN."""
    found = contenders()
    for name, usual in (("reference", "loss"), ("compiled", "loss"), ("autocast", "autocast"), ("ce", "ce")):
        for dtype in ("bfloat16", "float16"):
            expected = "autocast" if usual == "loss" else usual
            assert worker.judged_as(found[name], "cuda", dtype) == expected
            assert worker.judged_as(found[name], "cpu", dtype) == usual
        assert worker.judged_as(found[name], "cuda", "float32") == usual
    assert worker.judged_as(found["cpu"], "cuda", "bfloat16") == found["cpu"].checked_as


def test_a_case_that_is_stopped_keeps_the_contenders_it_has_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = named("voc", batch=1, height=24, width=24, labels="random")
    budget = Budget(0.0, 3, 3)
    case = Case("time", "headline", 1, tiny, ("ce", "reference", "cpu"), budget=budget)
    saved: list[list[dict[str, Any]]] = []
    first = worker.run_plan(Plan("whole", (case,)), on_result=lambda found: saved.append(copy.deepcopy(found)))
    assert [len(found) for found in saved] == [1, 2, 3, 3, 3]
    assert [record["status"] for record in saved[1]] == ["skipped"] * 2
    assert all("reason" not in record and record["status"] == "ok" and record["seconds"] for record in first)
    saved.clear()
    whole = worker._checked_step

    def stop(contender: Any, *rest: Any) -> Any:
        if contender.name == "cpu":
            raise KeyboardInterrupt
        return whole(contender, *rest)

    monkeypatch.setattr(worker, "_checked_step", stop)
    plan = Plan("stopped", (replace(case, contenders=("ce",)), case))
    with pytest.raises(KeyboardInterrupt):
        worker.run_plan(plan, on_result=lambda found: saved.append(copy.deepcopy(found)))
    assert [(record["contender"], record["status"]) for record in saved[-1]] == [
        *(("ce", "ok"), ("ce", "skipped"), ("reference", "skipped"))
    ]
    assert saved[-1][2]["check"]["ok"]
    assert tables.milliseconds(saved[-1][2]) == "stopped before the contenders were timed side by side"


def test_a_stopped_contender_has_its_time_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(steps: Any, budget: Budget, **options: Any) -> dict[str, Samples]:
        assert options["device"] == "cuda"
        return {name: Samples([0.002, 0.003, 0.001], None) for name in steps}

    monkeypatch.setattr(worker.timing, "interleaved", interleaved)
    found = worker.stopped(lambda: None, "cuda")
    assert found["reason"].endswith("; alone 2 ms [1.5, 2.5]")
    assert found["status"] == "skipped"
    assert "seconds" not in found


def run_pytest(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-q", *arguments]
    # A run inside a worker of pytest-xdist would take itself for one, and then measures nothing.
    inherited = {name: value for name, value in environment(folder).items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_pytest_checks_miniatures_when_benchmarks_are_disabled(tmp_path: Path) -> None:
    result = run_pytest(["benchmarks", "--benchmark-disable", "-k", "bf16 or binary"], tmp_path)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
    (tmp_path / "bench_test_backends.py").write_text(BACKENDS)
    wrong = run_pytest(["-p", "bench_test_backends", "benchmarks", "--benchmark-disable", "-k", "binary"], tmp_path)
    assert wrong.returncode == 1, wrong.stdout
    assert "WRONG: loss off by" in wrong.stdout
    failed = [line for line in wrong.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2
    assert all("off_by_one_percent" in line for line in failed)


def test_pytest_benchmark_gets_the_interleaved_samples(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    (tmp_path / "bench_test_groups.py").write_text(SMALL_GROUPS)
    arguments = ["-p", "bench_test_groups", "benchmarks", "--benchmark-only", f"--benchmark-json={stored}"]
    result = run_pytest([*arguments, "-k", "binary and (ce or reference)"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "interleaved medians and ratios" in result.stdout
    data: dict[str, Any] = json.loads(stored.read_text())
    found = {b["params"]["contender"]: b for b in data["benchmarks"]}
    assert set(found) == {"ce", "reference", "reference_cl"}
    assert len({b["stats"]["rounds"] for b in found.values()}) == 1
    info = found["ce"]["extra_info"]
    value, low, high = info["reference eager / this"]
    assert low <= value <= high
    best = min(found[name]["stats"]["median"] for name in ("reference", "reference_cl"))
    assert value == pytest.approx(best / found["ce"]["stats"]["median"])
    assert 0 < info["edge_share"] < 1
    assert info["saved_bytes_per_pixel"] == pytest.approx(8, abs=0.1)
    assert info["interleaved"]


def test_the_default_test_run_does_not_collect_benchmarks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "bench_*.py" in pytestconfig.getini("python_files")
    assert not list((ROOT / "tests").rglob("bench_*.py"))
