"""Runs plans, each in a process of its own under the allocator it asks for, and keeps every result as it comes."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from semeda_fast.files import atomic_path

from .. import machine
from . import limits
from .plans import Plan

SCHEMA = 1
RESULTS = "results.json"
_ROOT = Path(__file__).resolve().parents[2]
_HUGE = str(2**40)
# One heap, no page given back and no mapping made for a large tensor: what a tuned training job, or jemalloc, does.
TUNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": _HUGE, "MALLOC_TRIM_THRESHOLD_": _HUGE}


@dataclass
class Run:
    """One run of the suite, as it is written to results.json.

    Attributes:
        set_name: "smoke", "quick", "full".
        command: the arguments it was started with.
        records: all results so far.
        plans: name, state ("done", "interrupted", "failed", "left out") and seconds of each plan.
        complete: whether every plan was run to its end.
    """

    set_name: str
    command: str
    machine: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"))
    records: list[dict[str, Any]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def save(self, folder: Path) -> Path:
        """Write results.json into `folder` in one step, in the place of an earlier one."""
        path = folder / RESULTS
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(vars(self), indent=1), encoding="utf-8")
        return path


def load_run(path: Path) -> Run:
    """Read a results.json, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a run of this suite, or of another schema.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; expected a file that 'python -m benchmarks run' wrote") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {found}; run the benchmarks again")
    return Run(**data)


def tuned_reason() -> str:
    """Why the tuned allocator cannot be had here; "" where it can: the variables are glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return "the tuned allocator condition sets glibc's variables, and this system has no glibc"
    return ""


def worker_environment(plan: Plan, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a plan's process: its allocator and threads, and nothing left over of another's."""
    environment = dict(os.environ if base is None else base)
    for name in [name for name in environment if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        del environment[name]
    if plan.allocator == "tuned":
        environment.update(TUNED)
    environment["OMP_NUM_THREADS"] = str(plan.threads)
    paths = [str(_ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


class Outcome(NamedTuple):
    """What became of a worker.

    Attributes:
        records: those of finished cases, and of what the last one had checked.
        problem: "" or why it did not come to its end.
        overrun: the step that took more than its time, where that is the reason.
    """

    records: list[dict[str, Any]]
    problem: str
    overrun: limits.Step | None = None


def run_worker(
    plan: Plan, *, timeout: float | None = None, on_records: Any = None, say: limits.Say = limits.show
) -> Outcome:
    """Measure a plan in a process of its own; it is stopped where a step takes more than its time.

    Args:
        timeout: seconds for the whole.
        on_records: called once with the records, also where this is interrupted.
        say: called with each step before it begins.
    """
    with tempfile.TemporaryDirectory(prefix="semeda-bench-") as name:
        plan_path, result_path = Path(name) / "plan.json", Path(name) / "result.json"
        plan_path.write_text(json.dumps(plan.to_json()), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.suite.worker", str(plan_path), str(result_path)]
        process = subprocess.Popen(
            command, env=worker_environment(plan), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        problem, overrun = "", None
        try:
            overrun = limits.follow(process, say, timeout)
            if overrun is not None:
                problem = f"stopped: more than {overrun.seconds:.0f} s of {overrun.what}"
            elif (code := process.wait()) != 0:
                problem = f"the worker ended with exit code {code}"
        except TimeoutError:
            problem = f"stopped after {timeout:.0f} s: the time was up"
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
            records = json.loads(result_path.read_text(encoding="utf-8")) if result_path.is_file() else []
            if on_records is not None:
                on_records(records)
        return Outcome(records, problem, overrun)


def run_plans(
    plans: Sequence[Plan], run: Run, folder: Path, *, limit: float | None = None, imports: Sequence[str] = ()
) -> Run:
    """Measure all plans into `run` and write results.json after each.

    Args:
        limit: seconds after which no plan is begun and a running one is stopped.
        imports: modules for every worker.

    Raises:
        KeyboardInterrupt: after what was measured so far has been written.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    complete = True
    with tempfile.TemporaryDirectory(prefix="semeda-bench-oracle-") as cache:
        for number, plan in enumerate(plans, start=1):
            left = None if limit is None else limit - (time.monotonic() - start)
            if left is not None and left < 5:
                run.plans.append({"name": plan.name, "state": "left out", "seconds": 0.0, "problem": "the time was up"})
                complete = False
                continue
            print(f"[{number}/{len(plans)}] {plan.name}", file=sys.stderr, flush=True)
            plan = replace(plan, cache=cache, imports=(*plan.imports, *imports))
            entry: dict[str, Any] = {"name": plan.name, "state": "interrupted", "seconds": 0.0, "problem": ""}
            run.plans.append(entry)
            begun = time.monotonic()
            try:
                problem = run_worker(plan, timeout=left, on_records=run.records.extend).problem
                entry.update(state="failed" if problem else "done", problem=problem)
                complete = complete and not problem
            finally:
                entry["seconds"] = round(time.monotonic() - begun, 1)
                run.save(folder)
    run.complete = complete
    run.save(folder)
    return run


def new_run(set_name: str, command: str, device: str, threads: int) -> Run:
    """An empty run that knows its machine."""
    facts = {**machine.describe(device), "device": device, "threads": threads, "tuned_reason": tuned_reason()}
    return Run(set_name, command, facts)
