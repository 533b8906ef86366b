"""Build csrc/tests/sanitize.cpp with the CPU kernels under the address and undefined-behaviour sanitizers, and run it.

    python csrc/tests/sanitize.py [--source FOLDER] [--build FOLDER] [--emulator COMMAND] [PART OF A CASE'S DESCRIPTION]

Flags of the instruction sets are setup.py's; one that the compiler or the target does not take leaves its kernels
out, as in an install. CXX names the compiler (default g++, else clang++). Needs no torch. For a processor that is
not at hand CXX is a cross compiler and --emulator what runs its programs (`make sanitize-arm64`); the address
sanitizer is left out then, since it does not run in an emulation.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Undefined behaviour traps, which takes half as long to compile as a message; the trap's stack names the line.
SANITIZE = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=undefined"]
SANITIZE += ["-fno-sanitize-recover=all", "-fsanitize-undefined-trap-on-error", "-ffp-contract=fast", "-w"]
SANITIZE += ["-fPIC", "-fvisibility=hidden"]  # the same objects make the module that fuzz_native.py calls
HERE, EMULATED = ["-fsanitize=address"], ["-static"]


def instruction_set_flags(setup: Path) -> dict[str, list[str]]:
    """INSTRUCTION_SETS of setup.py, which cannot be imported: file name -> flags of GCC and Clang."""
    for node in ast.parse(setup.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTRUCTION_SETS":
            sets = ast.literal_eval(node.value)
            return {Path(source).name: flags["unix"] for source, flags in sets.items()}
    sys.exit(f"{setup} assigns no literal INSTRUCTION_SETS; tell {Path(__file__).name} where the flags are now")


def compile_one(command_line: list[str], source: Path, flags: list[str], folder: Path) -> Path:
    """The object file of one source; without `flags` where the compiler or the target refuses them.

    One that is there already, of the same sources by the same command, is taken.
    """
    made = folder / f"{source.stem}.o"
    note = made.with_suffix(".digest")
    digest = digest_of(source, [*command_line, *flags])
    if made.is_file() and note.is_file() and note.read_text() == digest:
        return made
    note.unlink(missing_ok=True)
    for extra in (flags, []) if flags else ([],):
        command = [*command_line, *extra, "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            print(done.stderr, end="", file=sys.stderr)
            note.write_text(digest)
            return made
        if extra:
            print(f"{source.name}: built without {' '.join(extra)}", file=sys.stderr)
    sys.exit(f"{source} does not compile:\n{shlex.join(command)}\n{done.stderr}")


def digest_of(source: Path, command: list[str]) -> str:
    """Of a source with the headers that it includes, and how it is compiled."""
    # "name.o: source header", lines of it ending in a backslash
    listed = subprocess.run([*command, "-MM", str(source)], capture_output=True, text=True)
    state = hashlib.sha256("\n".join([*command, listed.stderr]).encode())
    for path in shlex.split(listed.stdout.partition(":")[2].replace("\\\n", " ")):
        state.update(Path(path).read_bytes())
    return state.hexdigest()


def find_compiler() -> list[str]:
    """The command of CXX, else g++, else clang++."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not compiler[0]:
        sys.exit("the sanitizers need g++ or clang++; install one, or name it with CXX=...")
    if not shutil.which(compiler[0]):
        sys.exit(f"{compiler[0]} is not in PATH; install it, or name another by CXX=...")
    return compiler


def cpu_objects(compiler: list[str], source: Path, build: Path, more: list[Path]) -> list[Path]:
    """Object files of the CPU kernels and of `more` sources."""
    build.mkdir(parents=True, exist_ok=True)
    flags = instruction_set_flags(source / "setup.py")
    # The slowest to compile first, so that two processors end together.
    sources = sorted((source / "csrc" / "cpu").glob("*.cpp"), key=lambda path: "kernels" not in path.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda s: compile_one(compiler, s, flags.get(s.name, []), build), [*more, *sources]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", help="run only the cases whose description holds this")
    parser.add_argument("--source", type=Path, default=ROOT, help="the repository, or a copy with a fault in it")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize", help="where object files go")
    parser.add_argument("--emulator", type=shlex.split, default=[], help="runs the program of a cross compiler")
    options = parser.parse_args()
    compiler = find_compiler()
    if options.emulator and not shutil.which(options.emulator[0]):
        sys.exit(f"{options.emulator[0]} is not in PATH; install it, or name another by --emulator")
    compiler += [*SANITIZE, *(EMULATED if options.emulator else HERE), "-fopenmp"]
    program_source = options.source / "csrc" / "tests" / "sanitize.cpp"
    objects = cpu_objects(compiler, options.source, options.build, [program_source])
    program = options.build / "sanitize"
    link = [*compiler, *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True)
    environment = {"ASAN_OPTIONS": "handle_sigill=1:detect_stack_use_after_return=1"}
    arguments = [options.part] if options.part else []
    done = subprocess.run([*options.emulator, str(program), *arguments], env=environment | dict(os.environ))
    sys.exit(done.returncode and f"sanitize: the program ended with status {done.returncode}")


if __name__ == "__main__":
    main()
