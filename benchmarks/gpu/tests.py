"""The tests of `make gpu`: which there are, and how they are run side by side under a clock.

Every file of tests/ whose tests take a `case` (a backend on a device) runs for the device cuda, first for the fused
backends, then for the reference; the files of tests/gpu come before both, those of values first. Each is a pytest
process of its own for each fused backend, since a device-side assert or a bad address ends the use of the device for a
whole process, and one backend's compiling must not use up another's time. The module is also the
pytest plugin of those processes: it writes each result as it comes and stops at the deadline, so that a run
that is cut short still says what passed and what did not run. Plugins that a machine may lack (timeout,
xdist, cacheprovider's folder) are not needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "tests.json"
LOG = "SEMEDA_FAST_GPU_LOG"  # environment variables of the plugin: the file to write, and
DEADLINE = "SEMEDA_FAST_GPU_DEADLINE"  # when to stop, in seconds since the epoch
OUTCOMES = ("passed", "failed", "error", "skipped", "not run")
BACKENDS = ("cuda", "triton")  # with suites of their own, the most important first
FIRST = "gpu_values"
_TAKES_A_CASE = re.compile(r"\bcase: Case\b")
_KILL_AFTER = 5.0  # seconds after the deadline
_LEAST = 4.0  # seconds without which no process is started
# addopts ask for strict settings, and the timeout among the settings is a plugin's that may be missing.
_PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tests", "-o", "addopts=", "-q", "--tb=short")


@dataclass(frozen=True)
class Suite:
    """One pytest process.

    Attributes:
        command: without a shell, to be run in the folder that holds tests/.
    """

    name: str
    command: tuple[str, ...]


def suites(root: Path, match: str = "") -> list[Suite]:
    """All suites of a checkout, the most important first.

    Args:
        match: a pytest -k expression that tests have to match besides.
    """
    own = [path.relative_to(root).as_posix() for path in (root / "tests" / "gpu").glob("test_*.py")]
    own.sort(key=lambda path: (_stem(path) != FIRST, path))
    shared = guarantee_files(root)
    # A test's name ends with its backend in tests/gpu, and holds the case elsewhere.
    found = [(f"{name}: {_stem(path)}", path, f"{name}]") for path in own for name in BACKENDS]
    found += [(f"{name}: {_stem(path)}", path, f"{name}-cuda") for path in shared for name in BACKENDS]
    others = " and ".join(f"not {name}]" for name in BACKENDS)
    found += [(f"others: {_stem(path)}", path, others) for path in own]
    others = " and ".join(["-cuda", *(f"not {name}-cuda" for name in BACKENDS)])
    found += [(f"others: {_stem(path)}", path, others) for path in shared]  # the reference, and backends to come
    return [Suite(name, _command(path, expression, match)) for name, path, expression in found]


def guarantee_files(root: Path) -> list[str]:
    """The files of tests/ with tests that run on every backend and device of the registry."""
    paths = sorted((root / "tests").glob("test_*.py"))
    return [
        path.relative_to(root).as_posix() for path in paths if _TAKES_A_CASE.search(path.read_text(encoding="utf-8"))
    ]


def _stem(path: str) -> str:
    return Path(path).stem.removeprefix("test_")


def _command(path: str, expression: str, match: str) -> tuple[str, ...]:
    both = " and ".join(f"({part})" for part in (expression, match) if part)
    # As one word: an expression may begin with a dash.
    return (sys.executable, *_PYTEST, path, *([f"-k={both}"] if both else []))


def default_jobs() -> int:
    """Processes at a time: half the cores, at most 6; each compiles kernels, and holds a context on the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(6, cores // 2))


def run_suites(
    chosen: Sequence[Suite], folder: Path, env: Mapping[str, str], seconds: float, jobs: int
) -> list[dict[str, Any]]:
    """Run the suites, `jobs` at a time, until the time is up.

    Returns:
        of each suite name, state ("done", "cut short", "failed", "left out"), seconds, problem, output (its end), and
        tests: name, outcome, seconds, reason.
    """
    deadline = time.time() + seconds
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="semeda-gpu-tests-") as logs:

        def one(numbered: tuple[int, Suite]) -> dict[str, Any]:
            number, suite = numbered
            return _run_suite(suite, folder, env, deadline, Path(logs, f"{number}"), running)

        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        try:
            return list(pool.map(one, enumerate(chosen)))
        except BaseException:
            deadline = 0.0  # suites not begun yet are left out
            for process in running:
                end(process)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_suite(
    suite: Suite, folder: Path, env: Mapping[str, str], deadline: float, log: Path, running: list[Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"name": suite.name, "state": "left out", "seconds": 0.0, "problem": "the time was up"}
    if deadline - time.time() < _LEAST:
        return {**result, "output": "", "tests": []}
    begun = time.time()
    records, output = log.with_suffix(".jsonl"), log.with_suffix(".txt")
    child = {**env, LOG: str(records), DEADLINE: str(deadline)}
    with output.open("wb") as stream:
        process = subprocess.Popen(
            suite.command,
            cwd=folder,
            env=child,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.append(process)
        try:
            code: int | None = process.wait(max(0.0, deadline + _KILL_AFTER - time.time()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    tests = read_log(records, "the process was stopped: the time was up" if code is None else f"exit code {code}")
    state, problem = verdict(code, tests)
    text = scrub(output.read_text(encoding="utf-8", errors="replace")[-6000:], folder)
    return {
        "name": suite.name,
        "state": state,
        "seconds": round(time.time() - begun, 1),
        "problem": problem,
        "output": text if state == "failed" else "",
        "tests": [{**test, "reason": scrub(test["reason"], folder)} for test in tests],
    }


def verdict(code: int | None, tests: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """State and problem of a suite from pytest's exit code (None: killed) and its tests."""
    outcomes = [test["outcome"] for test in tests]
    if any(outcome in ("failed", "error") for outcome in outcomes):
        return "failed", ""
    if code is None or (code in (0, 2) and "not run" in outcomes):  # 2: pytest stopped itself
        return "cut short", "the time was up"
    if code in (0, 5):  # 5: nothing was selected
        return "done", ""
    return "failed", f"pytest ended with exit code {code}"


def read_log(path: Path, died: str) -> list[dict[str, Any]]:
    """Tests of a plugin's log; those collected and not begun are "not run", one begun and not ended is an "error".

    Args:
        died: why a test that has begun may have no end.
    """
    tests: dict[str, dict[str, Any]] = {}
    begun: set[str] = set()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed process may be half a line
            record = json.loads(line)
            for name in record.get("collected", ()):
                tests.setdefault(name, {"name": name, "outcome": "not run", "seconds": 0.0, "reason": ""})
            if "begun" in record:
                begun.add(record["begun"])
            if "name" in record:
                earlier = tests.get(record["name"], {})
                if earlier.get("outcome") in ("failed", "error"):
                    continue  # a later phase of the same test does not make it better
                tests[record["name"]] = record
    for name in begun:
        if tests.get(name, {}).get("outcome") == "not run":
            stopped = "the time was up" in died
            tests[name].update(
                outcome="not run" if stopped else "error",
                reason=died if stopped else f"the process ended within this test: {died}",
            )
    return list(tests.values())


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started in a session of its own and still runs, and all that it has started."""
    if process.poll() is not None:
        return
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of all outcomes, the suites, and which were left out or broken."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for result in results:
        for test in result["tests"]:
            counts[test["outcome"]] += 1
    return {
        "counts": counts,
        "left_out": [result["name"] for result in results if result["state"] == "left out"],
        "broken": [result["name"] for result in results if result["state"] == "failed"],
        "suites": [dict(result) for result in results],
    }


def failures_text(summary: Mapping[str, Any]) -> list[str]:
    """What the terminal shows: each failure's name and end, each suite that did not run to its end."""
    lines = []
    for suite in summary["suites"]:
        bad = [test for test in suite["tests"] if test["outcome"] in ("failed", "error")]
        for test in bad:
            end_of_reason = "\n      ".join(test["reason"].strip().splitlines()[-6:])
            lines.append(f"  {test['outcome'].upper()} {test['name']}\n      {end_of_reason}")
        if suite["state"] == "failed" and not bad:
            lines.append(f"  FAILED {suite['name']}: {suite['problem']}\n{suite['output'][-2000:]}")
        waiting = sum(test["outcome"] == "not run" for test in suite["tests"])
        if suite["state"] in ("cut short", "left out"):
            lines.append(f"  {suite['state'].upper()} {suite['name']}: {waiting or 'all'} of its tests did not run")
    return lines


def scrub(text: str, folder: Path) -> str:
    """Text without this machine's paths: results are committed."""
    places = {str(folder): ".", sys.prefix: "<python>", sys.base_prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    places[str(Path.home())] = "<home>"
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    return text


class Recorder:
    """Writes what happens as lines of JSON, stops the session at the deadline, and sets cuDNN's precision."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.stream = path.open("a", encoding="utf-8")
        self.deadline = deadline
        self.session: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, at once: the process may die at the next."""
        self.stream.write(json.dumps(record) + "\n")
        self.stream.flush()

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write({"name": report.nodeid, "outcome": "error", "seconds": 0.0, "reason": str(report.longrepr)})

    def pytest_collection_finish(self, session: Any) -> None:
        if "torch" in sys.modules:
            cudnn = sys.modules["torch"].backends.cudnn
            # TF32 convolutions, torch's default, would make the reference inexact and every budget wide.
            cudnn.allow_tf32, cudnn.deterministic = False, True
        self.write({"collected": [item.nodeid for item in session.items]})
        self._look_at_the_clock()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write({"begun": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            skipped = report.skipped and isinstance(report.longrepr, tuple)
            reason = "" if report.passed else str(report.longrepr[2] if skipped else report.longrepr)[-4000:]
            self.write(
                {"name": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3), "reason": reason}
            )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.time() > self.deadline:
            self.session.shouldstop = "the time was up"


def pytest_configure(config: Any) -> None:
    """The plugin's entry."""
    if LOG in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[LOG]), float(os.environ.get(DEADLINE, "inf"))))
