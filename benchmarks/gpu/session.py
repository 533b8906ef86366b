"""`make gpu`: every test and benchmark that needs a GPU, in one call of bounded time, with nothing installed.

The sources are laid out under build/gpu/tree as an install would lay them out (`kernels/` as `semeda_fast.kernels`),
so no pip, no network and no environment are needed: any Python that has torch will do. Then, each with a share of
the time that is left: the tests (`tests.py`), the benchmarks (`bench.py`), the layers (`layers.py`), the
CUDA kernels' tiles (`tiles.py`); at last the report (`report.py`). What does not fit is left out and named.
This module imports the standard library alone, so that it can say what is missing where nothing else works.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from . import tests as gpu_tests

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUTPUT = Path("build", "bench", "gpu")
WORK = Path("build", "gpu")
BUILD_LOG = "build.log"
SESSION = "session.json"
# Parts of the time left; what a phase does not use goes to those after it.
SHARES = {"tests": 45.0, "bench": 33.0, "layers": 10.0, "tiles": 12.0}
PHASES = (*SHARES, "report")
LIMIT = 520.0  # seconds; 9 minutes less what starting and stopping processes takes
BUILD_LIMIT = 180.0  # objects that are done are kept, so a call after one that was cut off goes on from them
REPORT_RESERVE = 15.0
GRACE = 8.0  # a phase stops itself at its limit and is killed this much later
LEAST = 5.0  # no phase is begun with less
OK, FAILED, BAD_CALL, NO_GPU, CUT_SHORT, INTERRUPTED = 0, 1, 2, 3, 4, 130

PROBE = """
import json, sys
facts = {"python": sys.version.split()[0]}
try:
    import torch
except Exception as error:
    facts["problem"] = f"torch cannot be imported: {type(error).__name__}: {error}"
else:
    facts.update(torch=torch.__version__, cuda=torch.version.cuda, hip=getattr(torch.version, "hip", None))
    try:
        if torch.cuda.is_available():
            at = torch.cuda.get_device_properties(0)
            torch.ones(1, device="cuda").sum().item()
            facts.update(gpu=at.name, capability=f"{at.major}.{at.minor}", gpu_memory_bytes=at.total_memory,
                         multiprocessors=at.multi_processor_count, gpus=torch.cuda.device_count())
        elif torch.version.cuda is None and facts["hip"] is None:
            facts["problem"] = f"torch {torch.__version__} is built without CUDA"
        else:
            facts["problem"] = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    except Exception as error:
        facts["problem"] = f"the GPU does not work: {type(error).__name__}: {error}"
for name in ("triton", "pytest", "pybind11", "setuptools", "PIL", "matplotlib"):
    try:
        facts.setdefault("modules", {})[name] = getattr(__import__(name), "__version__", "yes")
    except Exception:
        facts.setdefault("modules", {})[name] = None
print(json.dumps(facts))
"""


@dataclass
class Phase:
    """How one part went.

    Attributes:
        state: "done", "failed", "cut short" (by the clock), "left out".
        seconds, limit: taken, and given.
        problem: one line, "" where there is none.
    """

    name: str
    state: str
    seconds: float = 0.0
    limit: float = 0.0
    problem: str = ""


@dataclass
class Session:
    """One call, as session.json keeps it; phases that an earlier call ran on the same device stay listed.

    Attributes:
        machine: what the probe found, without paths.
        notes: what is missing, one sentence each.
        phases: by name, the latest run of each.
    """

    machine: dict[str, Any]
    command: str
    notes: list[str] = field(default_factory=list)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"))
    schema: int = 1

    def add(self, phase: Phase) -> None:
        """Keep and say how a phase went."""
        self.phases[phase.name] = {**asdict(phase), "created": self.created}
        text = f"{phase.name}: {phase.state} after {phase.seconds:.0f} of {phase.limit:.0f} s"
        say(f"{text}: {phase.problem}" if phase.problem else text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Test and measure on a GPU, within a time limit, from the checkout as it is.",
        epilog="Exit code 0: all went well; 1: a test or a measurement failed; 2: a bad call; 3: no GPU; "
        "4: the time was up before everything had run; 130: interrupted.",
    )
    made.add_argument(
        "--only", action="append", metavar="PHASE", type=_phases,
        help=f"only these phases, of {', '.join(PHASES)}; several: --only tests,layers. The report is always written",
    )  # fmt: skip
    made.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR",
        help=f"default {DEFAULT_OUTPUT}; files that an earlier call on the same device left there are replaced",
    )  # fmt: skip
    made.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for all phases, {LIMIT:g}")
    made.add_argument("--jobs", type=int, default=None, metavar="N", help="test processes at a time")
    made.add_argument("--tests", default="", metavar="EXPR", help="only tests that this pytest -k expression matches")
    made.add_argument("--plans", default="", metavar="REGEX", help="only benchmark plans whose name this matches")
    made.add_argument("--list", action="store_true", help="say what would be run, and run nothing; needs no GPU")
    return made


def _phases(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PHASES:
            raise argparse.ArgumentTypeError(f"{name!r} is no phase; expected some of {', '.join(PHASES)}")
    return names


def chosen_phases(only: Sequence[Sequence[str]] | None) -> list[str]:
    """The phases of a call in their order; the report is always the last."""
    wanted = {name for names in only for name in names} if only else set(PHASES)
    return [name for name in PHASES if name in wanted or name == "report"]


def time_for(phase: str, phases: Sequence[str], left: float) -> float:
    """Seconds for `phase` where it and those behind it in `phases` share what is left; never negative."""
    behind = [name for name in phases[phases.index(phase) :] if name in SHARES]
    return max(0.0, (left - REPORT_RESERVE) * SHARES[phase] / sum(SHARES[name] for name in behind))


def main(arguments: list[str] | None = None) -> int:
    """Run the phases; see `parser` for the exit codes."""
    start = time.monotonic()
    made = parser()
    options = made.parse_args(arguments)
    if options.limit <= 0 or (options.jobs is not None and options.jobs < 1):
        made.error(f"--limit and --jobs must be positive, got {options.limit:g} and {options.jobs}")
    phases = chosen_phases(options.only)
    output = options.output.resolve()
    if options.list:
        _list(phases, options, output)
        return OK
    if phases == ["report"]:
        return _run([*module("report"), str(output)], ROOT, environment(ROOT), 120.0)[0]
    facts = probe()
    if "gpu" not in facts:
        say(no_gpu_message(facts))
        return NO_GPU
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        session = begin(facts, command, output)
    except ValueError as error:
        say(f"error: {error}")
        return BAD_CALL
    triton = facts["modules"]["triton"] or "missing"
    say(f"{facts['gpu']}, torch {facts['torch']}, Triton {triton}: {', '.join(phases)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children are ended, results are kept
    try:
        return _session(session, phases, options, output, start + options.limit)
    except KeyboardInterrupt:
        say("interrupted: the results of finished phases are kept")
        save(session, output)
        return INTERRUPTED


def _session(session: Session, phases: list[str], options: argparse.Namespace, output: Path, deadline: float) -> int:
    tree = ROOT / WORK / "tree"
    stage(ROOT, tree)
    session.notes += missing(session.machine)
    limit = min(BUILD_LIMIT, deadline - time.monotonic())
    session.notes += build(ROOT, tree, session.machine.get("capability", ""), limit)
    for note in session.notes:
        say(f"note: {note}")
    for name in phases:
        if name == "report":
            continue
        limit = time_for(name, phases, deadline - time.monotonic())
        if limit < LEAST:
            session.add(Phase(name, "left out", 0.0, limit, "the time was up"))
        elif name == "tests":
            session.add(_tests(session, tree, output, limit, options))
        else:
            session.add(_measure(name, tree, output, limit, options))
        save(session, output)
    code, text = _run([*module("report"), str(output)], tree, environment(tree), REPORT_RESERVE + GRACE)
    if code:
        say(f"the report could not be written: {text or f'exit code {code}'}")
    states = {session.phases[name]["state"] for name in phases if name != "report"}
    if code or "failed" in states:
        return FAILED
    return CUT_SHORT if states - {"done"} else OK


def probe() -> dict[str, Any]:
    """Versions, and the GPU that torch sees; "problem" instead of "gpu" where it sees none."""
    try:
        found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
        facts = json.loads(found.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"problem": f"asking torch for a GPU failed: {type(error).__name__}", "modules": {}}
    assert isinstance(facts, dict)
    return facts


def no_gpu_message(facts: Mapping[str, Any]) -> str:
    """What was looked for, what was found, what to do."""
    driver = "nvidia-smi is in PATH" if shutil.which("nvidia-smi") else "no nvidia-smi in PATH"
    return (
        "make gpu: no GPU to run on; nothing was run and nothing was written.\n"
        f"  looked for: a CUDA device, through torch of {sys.executable}\n"
        f"  found:      {facts.get('problem', 'nothing')}; {driver}\n"
        "  to do:      run it on a machine with an NVIDIA GPU (capability 8.0 or above for the Triton kernels) and a "
        "torch built for CUDA;\n"
        "              name that torch's Python with: make gpu PYTHON=/path/to/python3\n"
        "  without a GPU: `make test` checks the kernels under Triton's interpreter, "
        "`python -m benchmarks.gpu --list` shows what would run here"
    )


def missing(facts: Mapping[str, Any]) -> list[str]:
    """What is not here and what that costs, one sentence each."""
    modules = facts.get("modules", {})
    consequences = {
        "triton": "the backend 'triton' cannot run",
        "pytest": "no test can run",
        "PIL": "workloads have random labels in place of scenes",
    }
    notes = [f"no {name} in this Python: {cost}" for name, cost in consequences.items() if not modules.get(name)]
    tools = [name for name in ("pybind11", "setuptools") if not modules.get(name)]
    if tools:
        notes.append(f"no {' and no '.join(tools)} in this Python: the backend 'cuda' cannot be built")
    if not find_tool("nvcc"):
        notes.append("no nvcc: CUDA sources cannot be compiled, the backend 'cuda' cannot run")
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")):
        notes.append("no C++ compiler: the backend 'cuda' cannot be built")
    if not find_tool("compute-sanitizer"):
        notes.append("no compute-sanitizer: its tests are skipped")
    return notes


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: in PATH, or in the toolkit's usual folders."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    return shutil.which(name) or next(
        (found for home in homes if home and (found := shutil.which(name, path=str(Path(home, "bin"))))), None
    )


def stage(root: Path, tree: Path) -> None:
    """Lay the sources out as an install would, with benchmarks and tests beside them; replaces an earlier layout."""
    if tree.exists():
        shutil.rmtree(tree)
    tree.mkdir(parents=True)
    skipped = shutil.ignore_patterns("__pycache__", "_C.*", "_C_cuda.*", "results", ".*")
    for name in ("semeda_fast", "benchmarks", "tests"):
        shutil.copytree(root / name, tree / name, ignore=skipped)
    shutil.copytree(root / "kernels", tree / "semeda_fast" / "kernels", ignore=skipped)
    shutil.copy2(root / "pyproject.toml", tree / "pyproject.toml")


def build(root: Path, tree: Path, capability: str, limit: float) -> list[str]:
    """Compile the CUDA module, without the CPU's, into the tree; returns what went wrong.

    For the device at hand alone where its capability, such as "9.0", is known: each further architecture takes
    as long again. SEMEDA_FAST_CUDA_ARCHS, where set, is obeyed. Without nvcc, which `missing` notes, nothing is tried.
    """
    if not any((root / "csrc").glob("cuda/*.cu")) or not find_tool("nvcc"):
        return []
    work = root / WORK
    work.mkdir(parents=True, exist_ok=True)
    built = work / "lib"
    shutil.rmtree(built, ignore_errors=True)  # a module of an earlier call must not stand in for one that fails
    env = {**os.environ, "SEMEDA_FAST_BUILD": "cuda"}
    if capability:
        env.setdefault("SEMEDA_FAST_CUDA_ARCHS", capability)
    command = [sys.executable, "setup.py", "build_ext", "--only", "semeda_fast._C_cuda"]
    say(f"compiling the CUDA kernels, up to {limit:.0f} s; output in {WORK / BUILD_LOG}")
    with (work / BUILD_LOG).open("wb") as log:
        places = ["--build-lib", str(built), "--build-temp", str(work / "temp")]
        code, text = _run([*command, *places], root, env, limit, log)
    for path in built.glob("semeda_fast/_C_cuda.*"):
        shutil.copy2(path, tree / "semeda_fast" / path.name)
    if code == 0:
        return []
    say((work / BUILD_LOG).read_text(encoding="utf-8", errors="replace")[-2000:])
    # The log may hold paths of this machine, and notes go into the report.
    return [f"the CUDA module did not build ({text or f'exit code {code}'}; {WORK / BUILD_LOG}): no backend 'cuda'"]


def environment(tree: Path) -> dict[str, str]:
    """Of the phases' processes: the tree first on the path, and CamVid where the checkout would find it."""
    made = dict(os.environ)
    paths = [str(tree), *made.get("PYTHONPATH", "").split(os.pathsep)]
    made["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    made["PYTHONUNBUFFERED"] = "1"
    made.setdefault("SEMEDA_FAST_CAMVID", str(ROOT.parent / "shared" / "data" / "camvid"))
    return made


def module(name: str) -> list[str]:
    """The command of a module of this suite."""
    return [sys.executable, "-m", f"benchmarks.gpu.{name}"]


def measure_command(name: str, output: Path, limit: float, plans: str) -> list[str]:
    """The command of the phases "bench", "layers" and "tiles"."""
    command = [*module(name), "--output", str(output), "--limit", f"{limit:.0f}"]
    return [*command, "--plans", plans] if plans and name == "bench" else command


def _measure(name: str, tree: Path, output: Path, limit: float, options: argparse.Namespace) -> Phase:
    begun = time.monotonic()
    code, problem = _run(measure_command(name, output, limit, options.plans), tree, environment(tree), limit + GRACE)
    seconds = time.monotonic() - begun
    if code == CUT_SHORT or problem:
        return Phase(name, "cut short", seconds, limit, problem or "the time was up before all was measured")
    text = "" if code == 0 else f"exit code {code}: see the report"
    return Phase(name, "done" if code == 0 else "failed", seconds, limit, text)


def _tests(session: Session, tree: Path, output: Path, limit: float, options: argparse.Namespace) -> Phase:
    if not session.machine["modules"].get("pytest"):
        return Phase("tests", "left out", 0.0, limit, "this Python has no pytest")
    begun = time.monotonic()
    jobs = options.jobs or gpu_tests.default_jobs()
    suites = gpu_tests.suites(tree, options.tests)
    results = gpu_tests.run_suites(suites, tree, environment(tree), limit - GRACE, jobs)
    summary = gpu_tests.summarise(results)
    write_json(output / gpu_tests.RESULTS, {"machine": session.machine, "created": session.created, **summary})
    for line in gpu_tests.failures_text(summary):
        say(line)
    counts = summary["counts"]
    text = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    state = "done"
    if counts["failed"] or counts["error"] or summary["broken"]:
        state = "failed"
    elif counts["not run"] or summary["left_out"]:
        state = "cut short"
    return Phase("tests", state, time.monotonic() - begun, limit, text)


def _run(
    command: Sequence[str], folder: Path, env: Mapping[str, str], limit: float, log: BinaryIO | None = None
) -> tuple[int, str]:
    """Exit code, and "" or why the process was ended; its whole group is. Its output goes to `log` where given."""
    error_output = None if log is None else subprocess.STDOUT
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=error_output,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 1, f"{type(error).__name__}: {error.strerror}"
    try:
        return process.wait(limit), ""
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {limit:.0f} s: the time was up"
    finally:
        gpu_tests.end(process)


def begin(facts: dict[str, Any], command: str, output: Path) -> Session:
    """A session that takes over what an earlier one on the same device left in the folder.

    Raises:
        ValueError: the folder holds another device's results, or something else under the session's name.
    """
    session = Session({"system": f"{platform.system()} {platform.machine()}", **facts}, command)
    path = output / SESSION
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            device, phases = earlier["machine"]["gpu"], earlier["phases"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no session of make gpu; choose another folder with GPU_OUTPUT=...") from None
        if device != facts["gpu"]:
            raise ValueError(
                f"{output} holds results of {device}, and this is {facts['gpu']}; choose another folder with "
                "GPU_OUTPUT=..."
            )
        session.phases = dict(phases)
    output.mkdir(parents=True, exist_ok=True)
    return session


def save(session: Session, output: Path) -> None:
    """Write session.json."""
    write_json(output / SESSION, asdict(session))


def write_json(path: Path, data: object) -> None:
    """Replace a file in one step; `semeda_fast.files` would bring torch into this process."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def say(text: str) -> None:
    """To stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def _list(phases: Sequence[str], options: argparse.Namespace, output: Path) -> None:
    left = options.limit
    for name in phases:
        if name == "report":
            print(f"report\n    {shlex.join([*module('report'), str(output)])}")
            continue
        limit = time_for(name, phases, left)
        left -= limit
        print(f"{name}: {limit:.0f} s, and what is left of those before")
        if name == "tests":
            for suite in gpu_tests.suites(ROOT, options.tests):
                print(f"    {suite.name}: {shlex.join(suite.command)}")
        else:
            print(f"    {shlex.join(measure_command(name, output, limit, options.plans))}")
