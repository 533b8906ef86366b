"""Proof that the checks of the CUDA kernels see faults: in the emulated hardware, and in the kernels' sources.

The faults of tests/cuda_source_faults.py are seeded, one at a time, into a copy of csrc, which is compiled for the
default proxy in half precision, and tests/cuda_checks.py has to go red on it. A few of them are part of every run, all
of them with SEMEDA_FAST_CUDA_FAULTS=full.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cuda_emulated
import cuda_machine
import pytest
from cuda_checks import Scene, examine, problem_of
from cuda_machine import get_number, last_launch, least_memory, machine, run, set_number
from cuda_source_faults import SOURCE_FAULTS

from semeda_fast.backends.problem import Problem

pytestmark = pytest.mark.skipif(
    not os.environ.get(cuda_machine.VARIABLE), reason="the emulated CUDA kernels are not built here"
)
ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get("SEMEDA_FAST_CUDA_FAULTS") == "full"


@pytest.mark.parametrize("fault", [16, 32])
def test_a_wrong_swizzle_of_matrix_loads_is_seen(fault: int) -> None:
    with (
        machine(swizzle_fault=fault),
        pytest.raises((AssertionError, RuntimeError), match=r"layer|codes|shared memory"),
    ):
        examine(Scene(classes=12))


KERNELS = {"before forward": 0, "forward": 1, "finish": 2, "before backward": 3, "backward": 4}
ONE = {"tile_rows": 8, "tile_width": 16, "multiprocessors": 1}
# Two tiles, or four where two blocks run at once: each block takes two.
BARRIER_SCENES = {
    "few classes": Scene(32, 12, machine=ONE),
    "chunks of classes": Scene(32, 12, classes=30, labels="noise", machine=ONE),
    "behind the ReLU": Scene(32, 12, classes=12, tap="post", labels="noise", machine=ONE),
    "strips": Scene(56, 12, classes=50, machine={"tile_rows": 14, "tile_width": 16, "multiprocessors": 1}),
    "four layers": Scene(32, 10, widths=(16, 32, 32), machine=ONE),
    "wide": Scene(16, 12, widths=(32, 64), edge_classes=64, machine=ONE),
}


def harmless_barriers(scene: Scene, kernel: str, count: int, copied: bool) -> set[int]:
    """Those that may be missing, since what lies before them and behind them touches other memory."""
    harmless = {count - 1}  # the block ends
    if kernel == "before forward":
        harmless.add(0)  # the first layer's table: each thread reads its own sum
    if kernel in ("forward", "backward"):
        harmless.add(0)  # zeros and weights, which the next phase does not read yet
    if kernel == "backward" and len(scene.widths) == 2:
        harmless.add((count - 1) // 2)  # the next tile's codes go beside d_p, with an odd number of layers
    if kernel == "forward" and copied and scene.classes > 24:
        chunks = -(-scene.classes // 24)
        of_a_tile = 2 + 2 * chunks + 2 * len(scene.widths)
        # Behind the first layer, whose weights are read from device memory; then the second's are copied.
        harmless |= {1 + 2 * chunks + first for first in range(0, count - 1, of_a_tile)}
    return harmless


@pytest.mark.parametrize("copied", [False, True], ids=["resident", "copied"])
@pytest.mark.parametrize("name", BARRIER_SCENES)
def test_every_missing_barrier_is_a_race(name: str, copied: bool) -> None:
    """Each in turn, in every kernel."""
    scene = BARRIER_SCENES[name]
    problem = problem_of(scene)
    with machine(**scene.machine), least_memory(problem) if copied else contextlib.nullcontext():
        for number in KERNELS.values():
            set_number(f"barriers_{number}", 0)
        run(problem)
        assert last_launch().tiles == 2 * last_launch().blocks
        for kernel, number in KERNELS.items():
            count = get_number(f"barriers_{number}")
            quiet = {dropped for dropped in range(count) if not races_without(problem, number, dropped)}
            assert quiet == harmless_barriers(scene, kernel, count, copied), f"{kernel}, {count} barriers of a block"


def races_without(problem: Problem, kernel: int, barrier: int) -> bool:
    with machine(drop_barrier=barrier, drop_kernel=kernel):
        try:
            run(problem)
        except RuntimeError as error:
            return "a race" in str(error)
    return False


FAULTS = {f"{file}: {name}": (file, *texts) for file, group in SOURCE_FAULTS.items() for name, texts in group.items()}
ALWAYS = (
    "numbers.h: wrong swizzle",
    "forward.h: border is not zeroed",
    "forward.h: a barrier is missing",
)
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", f"-DSEMEDA_FAST_CUDA_MODULE={cuda_emulated.NAME}"]
FLAGS += ["-DSEMEDA_FAST_EMULATE_DEFAULT_HALF"]  # the rest would take much longer
needs_compiler = pytest.mark.skipif(
    not cuda_emulated.find_compiler() or importlib.util.find_spec("pybind11") is None,
    reason="there is no C++ compiler, or no pybind11",
)


PLANNED = ("plan.cpp", "layout.h")  # faults in which change plan.o, too


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What no fault changes, or few do, compiled once: bindings.cpp alone takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("cuda_faults")
    headers = [importlib.import_module("pybind11").get_include(), sysconfig.get_paths()["include"]]
    include = [flag for path in headers for flag in ("-I", path)]
    bindings = Path(os.environ[cuda_machine.VARIABLE]).with_name(cuda_emulated.KEPT)
    sources = [] if bindings.is_file() else [ROOT / "csrc" / "cuda" / "bindings.cpp"]
    sources.append(ROOT / "csrc" / "cuda" / "plan.cpp")
    sources += sorted((ROOT / "csrc" / "tests").glob("cuda_emulation_*.cpp"))
    made = {"bindings.cpp": bindings} | {source.name: folder / f"{source.stem}.o" for source in sources}
    for source in sources:
        compile_with("-O0", *include, "-c", source, "-o", made[source.name])
    return made


def compile_with(*arguments: str | Path) -> None:
    command = [*cuda_emulated.find_compiler(), *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build_copy(folder: Path, objects: dict[str, Path], file: str, text: str, wrong: str) -> Path:
    """The emulated module of a copy of csrc where `wrong` stands for `text` in csrc/cuda/`file`."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / "cuda" / file
    code = source.read_text(encoding="utf-8")
    assert code.count(text) == 1, f"{file} has {text!r} {code.count(text)} times; adapt this fault"
    source.write_text(code.replace(text, wrong), encoding="utf-8")
    parts = [csrc / "tests" / "cuda_emulation.cpp"]
    for name, made in objects.items():
        parts.append(csrc / "cuda" / name if name == "plan.cpp" and file in PLANNED else made)
    module = folder / f"{cuda_emulated.NAME}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    compile_with("-O1", *cuda_emulated.LINK, *parts, "-o", module)
    return module


def examine_module(module: Path) -> tuple[int, str]:
    """Exit code of tests/cuda_checks.py on a module, and what it said; a process of its own, since it may crash."""
    environment = {**os.environ, cuda_machine.VARIABLE: str(module), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "cuda_checks.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
    return done.returncode, done.stdout + done.stderr


@needs_compiler
@pytest.mark.parametrize("name", FAULTS if ALL else ALWAYS)
def test_a_seeded_fault_is_seen(name: str, objects: dict[str, Path], tmp_path: Path) -> None:
    code, said = examine_module(build_copy(tmp_path, objects, *FAULTS[name]))
    print(said)
    assert code != 0, "no check has seen this fault"
    crashed = code < 0
    assert crashed or re.search(r"^SEEN in .*: (AssertionError|RuntimeError): ", said, re.MULTILINE), said


@needs_compiler
def test_the_copy_alone_is_no_fault(objects: dict[str, Path], tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    module = build_copy(tmp_path, objects, "forward.h", "#pragma once", "#pragma once  // copied")
    assert examine_module(module) == (0, "")


def test_every_fault_fits_the_sources() -> None:
    """A fault whose text is gone would be left out unseen until somebody runs them all."""
    assert set(ALWAYS) <= set(FAULTS)
    for name, (file, text, wrong) in FAULTS.items():
        assert text != wrong
        found = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8").count(text)
        assert found == 1, f"{name}: {text!r} occurs {found} times; adapt this fault"
