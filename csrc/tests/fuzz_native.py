"""Build both native modules under the sanitizers, and call all their functions with right and wrong memory.

    python csrc/tests/fuzz_native.py [--calls 10000] [--seed 0] [--source FOLDER] [--build FOLDER]

The CUDA module is the one around the emulation of a GPU. fuzz_entries.py makes the calls: those that are right must
succeed, all others raise, and the address sanitizer has nothing to report. Needs g++, pybind11 and hypothesis.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sanitize import HERE, ROOT, SANITIZE, compile_one, cpu_objects, find_compiler

CUDA_MODULE = "_C_cuda_emulated"
SHARE = {"_C": 0.7, CUDA_MODULE: 0.3}  # of the calls
ASAN_OPTIONS = "detect_leaks=0:allocator_may_return_null=1:handle_sigill=1:detect_stack_use_after_return=0"


def build_modules(source: Path, build: Path, names: Sequence[str]) -> dict[str, Path]:
    """The modules of these names."""
    pybind11 = importlib.import_module("pybind11").get_include()
    headers = ["-I", pybind11, "-I", sysconfig.get_paths()["include"]]
    compiler = [*find_compiler(), *SANITIZE, *HERE]
    csrc = source / "csrc"
    modules = {name: build / f"{name}.so" for name in names}
    if "_C" in modules:
        objects = cpu_objects([*compiler, "-fopenmp"], source, build, [])
        objects.append(compile_one([*compiler, "-fopenmp", *headers], csrc / "bindings.cpp", [], build))
        link([*compiler, "-fopenmp"], objects, modules["_C"])
    if CUDA_MODULE in modules:
        # The emulation counts every access, and is slow enough.
        command = [*compiler, "-O2", *headers, f"-DSEMEDA_FAST_CUDA_MODULE={CUDA_MODULE}"]
        sources = [*sorted((csrc / "tests").glob("cuda_emulation*.cpp")), *sorted((csrc / "cuda").glob("*.cpp"))]
        folder = build / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda path: compile_one(command, path, [], folder), sources))
        link(compiler, objects, modules[CUDA_MODULE])
    return modules


def link(compiler: Sequence[str], objects: Sequence[Path], module: Path) -> None:
    subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(module)], check=True)


def runtimes() -> str:
    """What has to be there before Python is: it was linked with neither, and the sanitizer looks for C++ at once."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*find_compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            sys.exit(f"{command[0]} has no {name}: make fuzz-native needs g++ with its sanitizer; name it with CXX=...")
        found.append(str(Path(path).resolve()))
    return " ".join(found)


def fuzz(module: Path, calls: int, seed: int, preload: str, quiet: bool = False) -> str:
    """What went wrong, or ""."""
    last = module.with_suffix(".last")
    last.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("fuzz_entries.py")), str(module)]
    command += ["--calls", str(calls), "--seed", str(seed), "--last", str(last)]
    environment = {"ASAN_OPTIONS": ASAN_OPTIONS, **os.environ, "LD_PRELOAD": preload}
    done = subprocess.run(command, env=environment, capture_output=quiet, text=True)
    if done.returncode == 0:
        return ""
    call = last.read_text().strip() if last.is_file() else "no call"
    cause = next((line for line in (done.stderr or "").splitlines() if "ERROR" in line or module.name in line), "")
    return f"{module.name}: status {done.returncode}, seed {seed}; the last call was {call} {cause}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path, default=ROOT, help="the repository, or a copy with a fault in it")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize", help="where object files go")
    options = parser.parse_args()
    modules = build_modules(options.source, options.build, list(SHARE))
    preload = runtimes()
    shares = {modules[name]: round(options.calls * share) for name, share in SHARE.items()}
    problems = [fuzz(module, calls, options.seed, preload) for module, calls in shares.items()]
    if any(problems):
        sys.exit("fuzz-native: " + "; ".join(filter(None, problems)))
    print(f"fuzz-native: {options.calls} calls, exceptions alone, and no report of the sanitizers")


if __name__ == "__main__":
    main()
