"""The CUDA kernels around an emulation of a GPU, as a module for the CPU: compiled once for a state of the sources.

`announce` names it to semeda_fast, which must not have been imported yet; `python tests/cuda_emulated.py` compiles it
and prints its path. It holds csrc/cuda/*.cpp, which is all but the launches, and csrc/tests/cuda_emulation*.cpp.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock  # torch needs it, so it is there

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "SEMEDA_FAST_CUDA_EMULATION"
NAME = "_C_cuda_emulated"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-DSEMEDA_FAST_CUDA_MODULE={NAME}"]
KEPT = "bindings.o"  # beside the module, for the modules of test_cuda_faults.py: it takes longest to compile
LINK = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
WAIT = 900.0  # seconds for another process that compiles the same


class Emulation(NamedTuple):
    """The module's path, or None and why there is none; `broken` where the sources do not compile."""

    path: Path | None
    reason: str = ""
    broken: bool = False


def announce() -> None:
    """Set the environment variable that semeda_fast reads; empty where there is no emulation, for child processes."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(build().path or "")


@functools.cache
def build(root: Path = ROOT) -> Emulation:
    """The compiled module under build/cuda-emulation; compiles where the sources, the compiler or Python are new."""
    emulation = sorted((root / "csrc" / "tests").glob("cuda_emulation*.cpp"))
    sources = [*emulation, *sorted((root / "csrc" / "cuda").glob("*.cpp"))]  # the slowest to compile first
    if not emulation:
        return Emulation(None, "there are no sources of the emulation here")
    compiler = find_compiler()
    if not compiler:
        return Emulation(None, "there is no g++ or clang++ to compile the emulated CUDA kernels")
    if importlib.util.find_spec("pybind11") is None:
        return Emulation(None, "there is no pybind11 to compile the emulated CUDA kernels")
    folder = root / "build" / "cuda-emulation" / digest(root, compiler)
    path = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=WAIT):
        if path.is_file():
            return Emulation(path)
        print("semeda_fast: compiling the emulated CUDA kernels, once", file=sys.__stderr__, flush=True)
        problem = compile_into(path, sources, compiler)
    return Emulation(None, problem, True) if problem else Emulation(path)


def find_compiler() -> list[str]:
    """The command of CXX, else g++, else clang++, else nothing."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (named[:1] or ["g++", "clang++"]) if (path := shutil.which(name))]
    return [found[0], *named[1:]] if found else []


def digest(root: Path, compiler: Sequence[str]) -> str:
    """Of everything that the module depends on."""
    state = hashlib.sha256(Path(__file__).read_bytes())
    csrc = root / "csrc"
    patterns = ("*.h", "cuda/*.h", "cuda/*.cpp", "tests/*.h", "tests/cuda_emulation*.cpp")
    for path in sorted(path for pattern in patterns for path in csrc.glob(pattern)):
        state.update(f"{path.relative_to(csrc).as_posix()} {path.stat().st_size}\n".encode())
        state.update(path.read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    pybind11 = importlib.import_module("pybind11").__version__
    state.update("\n".join([*compiler, version, *FLAGS, pybind11, sys.version]).encode())
    return state.hexdigest()[:16]


def compile_into(path: Path, sources: Sequence[Path], compiler: Sequence[str]) -> str:
    """Compile side by side and link; the module appears whole or not at all. Returns "" or what the compiler said."""
    pybind11 = importlib.import_module("pybind11").get_include()
    include = ["-I", pybind11, "-I", sysconfig.get_paths()["include"]]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]

        def compile_one(source: Path, made: Path) -> str:
            return _run([*compiler, *FLAGS, *include, "-c", str(source), "-o", str(made)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = list(pool.map(compile_one, sources, objects))
        linked = Path(scratch, path.name)
        problem = "\n".join(filter(None, problems)) or _run([*compiler, *LINK, *map(str, objects), "-o", str(linked)])
        problem = problem or _run([sys.executable, "-c", LOAD, NAME, str(linked)])  # for symbols that nobody defines
        if not problem:
            if Path(scratch, KEPT).is_file():
                Path(scratch, KEPT).replace(path.parent / KEPT)
            linked.replace(path)
    return problem


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{shlex.join(command)}\n{done.stderr or f'exit code {done.returncode}'}"


if __name__ == "__main__":
    made = build()
    print(made.path or made.reason)
    sys.exit(made.path is None)
