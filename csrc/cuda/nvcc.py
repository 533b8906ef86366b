"""The CUDA toolkit as setup.py uses it: finds nvcc, chooses the architectures, compiles csrc/cuda/*.cu.

Imports the standard library alone, and asks for no GPU and no driver. An architecture is a number as in
`architectures()` of csrc/cuda/api.h: 90 is machine code for sm_90, -90 is PTX of compute_90, which the driver of a
newer GPU compiles.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHS_VARIABLE = "SEMEDA_FAST_CUDA_ARCHS"
DEFAULT = (80, 86, 89, 90, 100, 120)  # A100; RTX 30; RTX 40 and L4; H100; B200; RTX 50
HOME_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
USUAL_HOMES = ("/usr/local/cuda", "/opt/cuda")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall")
# nvcc reads these itself, so an object depends on them.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
LAUNCHERS = frozenset({"ccache", "sccache", "distcc", "icecc"})


class CudaBuildError(Exception):
    """Why the CUDA module cannot be built, and what to do."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and what it says of itself.

    Attributes:
        nvcc: its path.
        version: such as "13.0".
        machine_code, ptx: architectures that it compiles for, such as 90, in both forms.
        include_dirs, library_dirs: of the CUDA runtime.
    """

    nvcc: str
    version: str
    machine_code: frozenset[int]
    ptx: frozenset[int]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str:
    """The path of nvcc: in CUDA_HOME or CUDA_PATH, else in PATH, else in the toolkit's usual folders.

    Raises:
        CudaBuildError: it is in none of them.
    """
    named = [environment[name] for name in HOME_VARIABLES if environment.get(name)]
    for folder in [*(os.path.join(home, "bin") for home in named), environment.get("PATH", "")]:
        if found := shutil.which("nvcc", path=folder):
            return found
    for home in USUAL_HOMES:
        if found := shutil.which("nvcc", path=os.path.join(home, "bin")):
            return found
    variables = ", ".join(f"{name} ({environment.get(name) or 'not set'})" for name in HOME_VARIABLES)
    raise CudaBuildError(
        f"nvcc was not found: looked in {variables}, PATH, {', '.join(USUAL_HOMES)}. Install NVIDIA's CUDA toolkit "
        "(12.8 or later has all architectures), or set CUDA_HOME to the folder whose bin/ holds nvcc"
    )


def inspect(nvcc: str, ccbin: Sequence[str] = ()) -> Toolkit:
    """Ask nvcc for its version, its architectures and the folders of the CUDA runtime.

    Raises:
        CudaBuildError: it does not run.
    """
    release = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    machine_code = frozenset(map(int, re.findall(r"^sm_(\d+)$", _output([nvcc, "--list-gpu-code"]), re.MULTILINE)))
    ptx = frozenset(map(int, re.findall(r"^compute_(\d+)$", _output([nvcc, "--list-gpu-arch"]), re.MULTILINE)))
    with tempfile.TemporaryDirectory() as folder:
        # The path of nvcc does not tell where the toolkit is: it may be a wrapper script. Its dry run does.
        empty = Path(folder, "empty.cu")
        empty.touch()
        dry_run = _output([nvcc, *ccbin, "--dryrun", "-o", str(Path(folder, "empty")), str(empty)])
    home = Path(nvcc).resolve().parent.parent
    return Toolkit(
        nvcc=nvcc,
        version=release.group(1) if release else "of unknown version",
        machine_code=machine_code,
        ptx=ptx,
        include_dirs=_folders(dry_run, "INCLUDES", "-I") or (str(home / "include"),),
        library_dirs=_folders(dry_run, "LIBRARIES", "-L") or (str(home / "lib64"), str(home / "lib" / "x64")),
    )


def _output(command: Sequence[str]) -> str:
    """What a command prints, to stdout and stderr."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise CudaBuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["nothing was printed"]
        raise CudaBuildError(f"`{shlex.join(command)}` ended with exit code {done.returncode}: {said[-1]}")
    return done.stdout


def _folders(dry_run: str, variable: str, option: str) -> tuple[str, ...]:
    """The folders that a variable of `nvcc --dryrun` names, which are there, after an option such as -I."""
    line = re.search(rf"^#\$ {variable}=(.*)$", dry_run, re.MULTILINE)
    words = [word for word in shlex.split(line.group(1)) if word.startswith(option)] if line else []
    folders = [os.path.normpath(word[len(option) :]) for word in words]
    return tuple(folder for folder in folders if os.path.isdir(folder))


def parse_architectures(text: str) -> list[int]:
    """The architectures that SEMEDA_FAST_CUDA_ARCHS asks for: "80,90+PTX" is [80, 90, -90]; empty for the default.

    Raises:
        ValueError: the text is no such list.
    """
    chosen: list[int] = []
    for word in re.split(r"[\s,;]+", text.strip(" \t,;")) if text.strip(" \t,;") else []:
        match = re.fullmatch(r"(\d{1,2})\.?(\d)(\+PTX)?", word, re.IGNORECASE)
        number = int(match.group(1) + match.group(2)) if match else 0
        if number < DEFAULT[0]:
            raise ValueError(
                f"{ARCHS_VARIABLE} must list architectures of {DEFAULT[0]} or above, such as 80,90 or '86 90+PTX' "
                f"(+PTX adds code that newer GPUs compile for themselves), or be 'none'; got {word!r} in {text!r}"
            )
        chosen += [number, -number] if match and match.group(3) else [number]
    return list(dict.fromkeys(chosen))


def choose_architectures(asked: Sequence[int], toolkit: Toolkit) -> list[int]:
    """`asked`, or by default all of DEFAULT that this nvcc knows and PTX of the newest of them.

    Raises:
        CudaBuildError: this nvcc does not know one that was asked for, or none of the default.
    """
    known = toolkit.machine_code & toolkit.ptx  # machine code goes through PTX
    if asked:
        unknown = [abs(number) for number in asked if abs(number) not in known]
        if unknown:
            raise CudaBuildError(
                f"{ARCHS_VARIABLE} asks for {', '.join(map(str, unknown))}, and nvcc {toolkit.version} "
                f"({toolkit.nvcc}) knows {', '.join(map(str, sorted(known)))}; change the list or the toolkit"
            )
        return list(asked)
    usable = [number for number in DEFAULT if number in known]
    if not usable:
        raise CudaBuildError(
            f"nvcc {toolkit.version} ({toolkit.nvcc}) knows none of the architectures "
            f"{', '.join(map(str, DEFAULT))}; install CUDA 11.1 or later"
        )
    return [*usable, -usable[-1]]


def gencode(architectures: Iterable[int]) -> list[str]:
    """nvcc's options for machine code (positive numbers) and PTX (negative numbers)."""
    kinds = [(abs(number), "sm" if number > 0 else "compute") for number in architectures]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in kinds]


def initialiser(architectures: Iterable[int]) -> str:
    """The value of the macro SEMEDA_FAST_CUDA_ARCHITECTURES, a C initialiser without braces."""
    return ",".join(map(str, architectures))


def host_compiler(environment: Mapping[str, str] = os.environ) -> list[str]:
    """nvcc's option for the host compiler that CXX names; empty where nvcc is to use its own choice."""
    words = shlex.split(environment.get("CXX", ""))
    if words and Path(words[0]).name in LAUNCHERS:
        words = words[1:]
    return [] if not words or environment.get("NVCC_CCBIN") else ["-ccbin", words[0]]


@dataclass(frozen=True)
class Compilation:
    """All that the objects of one build share.

    Attributes:
        options: of nvcc, before the source.
        headers: files that any source may include.
        folder: where objects go; one that was compiled from the same text by the same command is used again.
    """

    toolkit: Toolkit
    options: tuple[str, ...]
    headers: tuple[str, ...]
    folder: str

    @functools.cached_property
    def shared_state(self) -> bytes:
        """What every object depends on besides its source."""
        text = "\0".join([self.toolkit.nvcc, self.toolkit.version, *self.options])
        variables = "\0".join(os.environ.get(name, "") for name in NVCC_VARIABLES)
        return (text + "\0" + variables).encode() + b"\0".join(Path(header).read_bytes() for header in self.headers)

    def compile_all(self, sources: Sequence[str], say: Callable[[str], None]) -> list[str]:
        """The objects of all sources, compiled at the same time; `say` gets a line for each.

        Raises:
            CudaBuildError: nvcc failed; its output went to stderr.
        """
        processors = os.cpu_count() or 1
        # What is left over when each file has a processor works on a file's architectures.
        threads = max(1, processors // len(sources))
        parallel = [f"--threads={threads}"] if threads > 1 else []
        with ThreadPoolExecutor(min(processors, len(sources))) as pool:
            return list(pool.map(lambda source: self.compile_one(source, parallel, say), sources))

    def compile_one(self, source: str, parallel: Sequence[str], say: Callable[[str], None]) -> str:
        """The object of one source; options in `parallel` do not change it."""
        state = hashlib.sha256(self.shared_state + Path(source).read_bytes()).hexdigest()[:16]
        made = Path(self.folder, f"{Path(source).stem}-{state}{'.obj' if os.name == 'nt' else '.o'}")
        if made.is_file():
            say(f"{source}: unchanged, its object is used again")
            return str(made)
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_name(f"unfinished-{made.name}")
        command = [self.toolkit.nvcc, *self.options, *parallel, "-c", source, "-o", str(unfinished)]
        say(shlex.join(command))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        print(output, end="", file=sys.stderr, flush=True)  # whole, or the files' lines would mix
        if done.returncode:
            lines = output.splitlines()
            first = next((line for line in lines if "error" in line or "fatal" in line), "nothing was printed")
            raise CudaBuildError(f"nvcc ended with exit code {done.returncode} on {source}: {first.strip()}")
        unfinished.replace(made)
        return str(made)


def compile_options(architectures: Sequence[int]) -> list[str]:
    """nvcc's options for the kernels: language, code, and the list of architectures as a macro."""
    # nvcc splits -D at commas that are not escaped.
    value = initialiser(architectures).replace(",", "\\,")
    return [*FLAGS, *gencode(architectures), f"-DSEMEDA_FAST_CUDA_ARCHITECTURES={value}"]


if __name__ == "__main__":  # for the Makefile: the path of nvcc, or why there is none
    try:
        print(find_nvcc())
    except CudaBuildError as error:
        sys.exit(str(error))
