"""Benchmarks that have nothing to measure, or hang: an error at once, or of one contender, and progress meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import installs
import pytest
from source_builds import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command_line
from benchmarks import contenders as who
from benchmarks import timing
from benchmarks.suite import limits, runner
from benchmarks.suite.limits import Step, Watch
from benchmarks.suite.plans import Case, Plan
from benchmarks.timing import Budget
from benchmarks.workloads import named

# A backend that hangs when it is called, and may take three seconds.
HANGS = """
import time
from benchmarks.suite import limits
from semeda_fast.backends import registry as backends, reference

usual = limits.preparing
limits.preparing = lambda contender, pixels: 3.0 if contender.name == "hanging" else usual(contender, pixels)

def hang(*arguments):
    time.sleep(600)

backends.register(backends.Backend("hanging", hang, ("cpu",)))
"""
NATIVE = not who.why_no_subject()
needs_native = pytest.mark.skipif(not NATIVE, reason="the CPU kernels are not here")


def environment(folder: Path) -> dict[str, str]:
    # A run inside a worker of pytest-xdist would take itself for one, and then measures nothing.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def run_pytest(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", *arguments],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=280,
    )


# Nothing to measure


@pytest.mark.skipif(os.name != "posix", reason="the environment is made of links")
def test_a_bare_source_folder_has_no_benchmarks_but_a_remedy(tmp_path: Path) -> None:
    """43 of 67 tests would run, and none of them measures the library."""
    source = installs.checkout(tmp_path / "source")
    for name in ("benchmarks", "tests"):
        (source / name).symlink_to(ROOT / name)
    site = tmp_path / "site"
    installs.installed(site)
    script = (
        "import sys, pytest; sys.path.insert(0, ''); sys.exit(pytest.main(['benchmarks', '-p', 'no:cacheprovider']))"
    )
    done = installs.run_script(script, source, site, installs.others(tmp_path / "o"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "collected" not in done.stdout
    text = done.stdout + done.stderr
    assert (
        "no backend but the reference can run on 'cpu' here, so there is nothing to measure. cpu: semeda_fast._C"
        in text
    )
    assert f"pip install -e {source}" in text


def test_a_run_without_a_subject_is_a_bad_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(who, "fused_names", lambda device="cpu": ())
    assert command_line.main(["run", "--smoke", "--output", str(tmp_path / "out")]) == 2
    assert "there is nothing to measure. cpu: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command_line.main(["run", "--smoke", "--list"]) == 0


# Limits


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(limits.time, "monotonic", lambda: self.now)


def test_the_limit_of_rounds_follows_from_what_the_contenders_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), []
    watch = Watch("x", {"slow": 700.0}, Budget(20.0, 5, 60), said.append)
    for name, seconds in (("quick", 0.5), ("slow", 3.5)):
        watch.warming(name)
        watch.warmed(name, seconds)
    assert said == [Step("x: quick, warm-up", limits.LEAST, "quick"), Step("x: slow, warm-up", 700.0, "slow")]
    watch.warming("quick")
    watch.warming("slow")
    together = limits.LEAST + limits.SLACK * (limits.BETWEEN + 4.0)
    assert said[2:] == [Step("x: 2 side by side, warm-up", together)]  # of both, since either may be the one that hangs
    watch.round(1)
    watch.round(2)
    clock.now += limits.BETWEEN
    watch.round(3)
    assert [step.what for step in said[3:]] == [f"x: 2 side by side, round {n} of about 5" for n in (1, 3)]
    assert {step.seconds for step in said[3:]} == {together}


def test_rounds_that_a_budget_is_good_for() -> None:
    assert limits.planned_rounds(Budget(20.0, 5, 60), 1.0) == 20
    assert limits.planned_rounds(Budget(20.0, 5, 60), 0.9) == 23
    assert limits.planned_rounds(Budget(20.0, 5, 60), 100.0) == 5
    assert limits.planned_rounds(Budget(20.0, 5, 60), 0.0) == 60
    taken = timing.interleaved({"a": lambda: None}, Budget(0.0, 3, 9), warmup=1)["a"].seconds
    assert len(taken) == limits.planned_rounds(Budget(0.0, 3, 9), 1.0)


def test_the_limit_of_a_check_follows_from_what_is_checked() -> None:
    found = who.contenders()
    eager, compiled, searched = (limits.preparing(found[name], 10**6) for name in ("ce", "compiled", "compiled_max"))
    assert limits.LEAST < eager < compiled < searched
    assert limits.preparing(found["reference"], 4 * 10**6) > limits.preparing(found["reference"], 10**6)


def test_an_interleaved_run_announces_all_of_it() -> None:
    said: list[Step] = []
    steps = {"a": lambda: None, "b": lambda: None}
    watch = Watch("x", {}, Budget(0.0, 3, 3), said.append)
    samples = timing.interleaved(steps, Budget(0.0, 3, 3), warmup=2, watch=watch)
    assert [len(s.seconds) for s in samples.values()] == [3, 3]
    assert [step.contender for step in said] == ["a", "b", "", ""]


FOLLOWED = """
import json, sys, time
print("a library says something", flush=True)
print("\\x1e" + json.dumps({"what": "quick", "seconds": 60, "contender": "x"}), flush=True)
print("\\x1e" + json.dumps({"what": "slow", "seconds": 0.5, "contender": "y"}), flush=True)
time.sleep(float(sys.argv[1]))
"""


def follow(seconds: float, timeout: float | None = None) -> tuple[Any, list[Step]]:
    said: list[Step] = []
    command = [sys.executable, "-c", FOLLOWED, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            return limits.follow(process, said.append, timeout), said
        finally:
            process.kill()


def test_a_step_that_overruns_is_the_one_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = Step("quick", 60, "x"), Step("slow", 0.5, "y")
    assert follow(60) == (slow, [quick, slow])
    assert "a library says something" in capsys.readouterr().err
    assert follow(0) == (None, [quick, slow])
    with pytest.raises(TimeoutError):
        follow(60, timeout=0.3)


def test_a_worker_that_hangs_is_stopped_in_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tiny = named("voc", batch=1, height=24, width=24, labels="random")
    case = Case("time", "headline", 1, tiny, ("ce", "hanging", "reference"), budget=Budget(0.0, 3, 3))
    said: list[Step] = []
    records, problem, overrun = runner.run_worker(Plan("p", (case,), imports=("bench_hangs",)), say=said.append)
    assert overrun is not None
    assert overrun.contender == "hanging"
    assert overrun is said[-1]
    assert problem == f"stopped: more than {overrun.seconds:.0f} s of {overrun.what}"
    assert "2 of 3, hanging, is checked" in overrun.what
    assert [(record["contender"], record["status"]) for record in records] == [("ce", "skipped")]


@needs_native
def test_a_contender_that_hangs_is_the_one_that_fails(tmp_path: Path) -> None:
    """pytest-timeout is left out of it: with its one second for a test, nothing could be measured."""
    (tmp_path / "bench_hangs.py").write_text(HANGS)
    # Imported by the workers, too, which get their environment from here.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'benchmarks.suite.worker' in sys.orig_argv: import bench_hangs\n"
    )
    words = ["benchmarks", "-p", "bench_hangs", "--benchmark-only", "-o", "timeout=1", "-q"]
    done = run_pytest([*words, "-k", "binary and (-ce or hanging) and not _cl"], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1, done.stdout
    assert "hanging" in failed[0]
    assert "binary, fwdbwd, tuned malloc: stopped: more than 3 s of binary" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    shown = [line for line in done.stdout.splitlines() if "(up to " in line]
    for part in ("inputs", "ce, is checked", "hanging, is checked", "ce, warm-up", "1 side by side, round 1 of about"):
        assert any(part in line for line in shown), done.stdout
