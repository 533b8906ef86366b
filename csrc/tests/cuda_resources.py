"""Compiles csrc/cuda/*.cu for every architecture, without a GPU, and reads off what the compiler made of the kernels.

    python csrc/tests/cuda_resources.py                      # a table of all kernels and launches; minutes
    python csrc/tests/cuda_resources.py --check FILE.json    # exit code 1 where something is wrong, or worse than there
    python csrc/tests/cuda_resources.py --quick --check ...  # the default proxy in half precision on sm_90
    python csrc/tests/cuda_resources.py --launches ...       # compile no kernel: plans alone, registers as in FILE
    python csrc/tests/cuda_resources.py --module semeda_fast/_C_cuda.so --check ...    # of what is in a built module
    python csrc/tests/cuda_resources.py --write FILE.json

What is wrong by itself: spills, a stack frame, static shared memory, more shared memory than a block may have, fewer
blocks on a multiprocessor than planned, no tensor-core products in forward or backward. What is worse than stored:
registers, where the table was written with the same release of nvcc, and blocks of a multiprocessor; a plan
(cuda_plan.py) that is not the stored one. Instructions are counted where cuobjdump is found: in NVIDIA's toolkit, or
in Triton.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

import cuda_plan
import nvcc

ARCHITECTURES = cuda_plan.ARCHITECTURES
QUICK = (90,)
QUICK_SOURCES, QUICK_OPTION = r"_half$", "-DSEMEDA_FAST_CUDA_DEFAULT_PROXY_ONLY"
DIRECTIONS = ("forward", "backward")
TF32_PROXIES = ("default", "four-layer")  # the others are compiled for half precision alone
KERNELS = (
    *(f"{direction} {proxy} half" for direction in DIRECTIONS for proxy in cuda_plan.PROXIES.values()),
    *(f"{direction} {proxy} tf32" for direction in DIRECTIONS for proxy in TF32_PROXIES),
    *("prepare half", "prepare tf32", "finish"),
)
SYSTEM_SHARED = 1024  # bytes that cuobjdump counts from sm_90 on, and that no kernel asked for
LEAST_REGISTERS = 16  # fewer: the compiler has proved that the kernel does nothing, rightly or not
SLACK = 8  # registers by which a kernel may grow

Row = dict[str, Any]  # "sm_90" -> the fields of Resources, or of a launch


class Table(TypedDict):
    """What is stored: the release of nvcc, and rows by name."""

    nvcc: str
    kernels: dict[str, Row]
    launches: dict[str, Row]


class ResourcesError(Exception):
    """Why nothing can be said about the kernels, and what to do."""


class ToolError(ResourcesError):
    """nvcc or cuobjdump is missing, or failed: cuobjdump where the code is of a later toolkit."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory a thread.
        spills: bytes of spill stores and loads, from ptxas; 0 where a built module was read, whose stack tells.
        shared: bytes of static shared memory a block; the dynamic one is the plan's.
        products: tensor-core instructions in the code (HMMA), None where no cuobjdump was found.
        matrix_loads: ldmatrix instructions in the code (LDSM), or None.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    products: int | None = None
    matrix_loads: int | None = None


def readable(mangled: str) -> str:
    """The name of a kernel in the table, such as "forward default half".

    Raises:
        ResourcesError: the symbol is none of the kernels.
    """
    kernel = re.search(r"\d([a-z_]+)_kernel", mangled)
    if not kernel:
        raise ResourcesError(f"expected a symbol ..._kernel, got {mangled!r}; teach {Path(__file__).name} its name")
    # Kernels with the same arguments lie in anonymous namespaces, whose name holds that of the file.
    numbers = re.search(r"\d(Half|Tf32)|_(half|tf32)_cu_", mangled)
    # Proxy<blocks, K...>: a number, and a pack of numbers.
    pack = re.search(r"5ProxyI(?:Li\d+E)*J((?:Li\d+E)+)E", mangled)
    words = [kernel[1]]
    if pack:
        channels = tuple(map(int, re.findall(r"\d+", pack[1])))
        words.append(cuda_plan.PROXIES.get(channels, "-".join(map(str, channels))))
    if numbers:
        words.append((numbers[1] or numbers[2]).lower())
    return " ".join(words)


def parse_ptxas(text: str) -> dict[str, Resources]:
    """Symbol -> resources, from what `nvcc -Xptxas -v` prints; functions that a kernel calls count as its own."""
    found = {}
    for part in text.split("Compiling entry function ")[1:]:
        symbol = re.match(r"'(\S+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not symbol or not registers:
            raise ResourcesError(f"ptxas prints something new: {part[:200]!r}; teach {Path(__file__).name}")
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[symbol[1]] = Resources(
            registers=int(registers[1]),
            stack=sum(int(stack) for stack, _, _ in frames),
            spills=sum(int(stores) + int(loads) for _, stores, loads in frames),
            shared=int(shared[1]) if shared else 0,
        )
    return found


def parse_usage(text: str, architecture: int) -> dict[str, Resources]:
    """Symbol -> resources, from what `cuobjdump -res-usage` prints of one architecture's code."""
    found = {}
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    system = SYSTEM_SHARED if architecture >= 90 else 0
    for symbol, registers, stack, shared, local in re.findall(pattern, text):
        found[symbol] = Resources(int(registers), int(stack) + int(local), 0, max(0, int(shared) - system))
    return found


def count_instructions(text: str) -> dict[str, tuple[int, int]]:
    """Symbol -> tensor-core products and ldmatrix instructions, from what `cuobjdump -sass` prints."""
    found = {}
    for part in re.split(r"Function : ", text)[1:]:
        found[part.split(None, 1)[0]] = (len(re.findall(r"\sHMMA\.", part)), len(re.findall(r"\sLDSM\.", part)))
    return found


@functools.cache
def find_cuobjdump() -> str:
    """The path of cuobjdump: of the toolkit, in PATH, or of an installed Triton; "" for none."""
    homes = [*filter(None, map(os.environ.get, nvcc.HOME_VARIABLES)), *nvcc.USUAL_HOMES]
    folders = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    for place in (triton and triton.submodule_search_locations) or []:
        folders.append(os.path.join(place, "backends", "nvidia", "bin"))
    return next((path for folder in folders if (path := shutil.which("cuobjdump", path=folder))), "")


def run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end.

    Raises:
        ToolError: it failed.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"`{shlex.join(command)}` ended with exit code {done.returncode}:\n{done.stderr}")
    return done


def with_instructions(resources: dict[str, Resources], cubin: Path) -> dict[str, Resources]:
    """Add the counts of instructions, where cuobjdump is found."""
    if not find_cuobjdump():
        return resources
    counts = count_instructions(run([find_cuobjdump(), "-sass", str(cubin)]).stdout)
    found = {}
    for symbol, one in resources.items():
        products, matrix_loads = counts.get(symbol, (0, 0))
        found[symbol] = replace(one, products=products, matrix_loads=matrix_loads)
    return found


def compile_cubin(
    toolkit: Any, source: Path, architecture: int, folder: Path, extra: Sequence[str] = ()
) -> dict[str, Resources]:
    """Compile one file for one architecture, with setup.py's options; symbol -> resources."""
    cubin = folder / f"{source.stem}.sm_{architecture}.cubin"
    options = [*nvcc.compile_options([architecture]), *nvcc.host_compiler(), *extra]
    started = time.perf_counter()
    command = [toolkit.nvcc, *options, "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(source)]
    done = run(command)
    print(f"{source.name} for sm_{architecture}: {time.perf_counter() - started:.0f} s", flush=True)
    return with_instructions(parse_ptxas(done.stdout + done.stderr), cubin)


def compile_kernels(
    toolkit: Any, architectures: Sequence[int], only: str, jobs: int, extra: Sequence[str] = ()
) -> dict[str, Row]:
    """The table's kernels, of all sources whose name matches `only`, compiled side by side."""
    sources = [path for path in (cuda_plan.ROOT / "csrc" / "cuda").glob("*.cu") if re.search(only, path.stem)]
    # The slowest first, so that processors end together.
    sources.sort(key=lambda path: ("forward" not in path.stem, "backward" not in path.stem, "half" not in path.stem))
    work = [(source, architecture) for source in sources for architecture in architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda one: compile_cubin(toolkit, one[0], one[1], Path(folder), extra), work))
    return as_rows((architecture, one) for (_, architecture), one in zip(work, found, strict=True))


def read_module(module: Path) -> tuple[dict[str, Row], str]:
    """The table's kernels of the architectures in a built module, and the release of nvcc, "" where it does not tell.

    Raises:
        ToolError: there is no cuobjdump, or it cannot read the module.
        ResourcesError: there is no machine code in it, or a kernel that is not known.
    """
    if not find_cuobjdump():
        raise ToolError("no cuobjdump was found; NVIDIA's CUDA toolkit has it, and Triton")
    found: list[tuple[int, dict[str, Resources]]] = []
    releases = set()
    with tempfile.TemporaryDirectory() as folder:
        run([find_cuobjdump(), "-xelf", "all", str(module.resolve())], Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            releases |= set(re.findall(rb"Cuda compilation tools, release (\d+\.\d+)", cubin.read_bytes()))
            architecture = re.search(r"sm_(\d+)", cubin.name)
            if architecture:
                usage = run([find_cuobjdump(), "-res-usage", str(cubin)]).stdout
                resources = parse_usage(usage, int(architecture[1]))
                found.append((int(architecture[1]), with_instructions(resources, cubin)))
    if not any(resources for _, resources in found):
        raise ResourcesError(f"{module.name} holds no kernel; it was built without machine code")
    return as_rows(found), releases.pop().decode() if len(releases) == 1 else ""


def as_rows(found: Iterable[tuple[int, Mapping[str, Resources]]]) -> dict[str, Row]:
    """Rows by kernel, in the order of the table."""
    rows: dict[str, Row] = {}
    for architecture, resources in found:
        for symbol, one in resources.items():
            row = rows.setdefault(readable(symbol), {})
            if f"sm_{architecture}" in row:
                raise ResourcesError(f"two kernels are {readable(symbol)!r}; teach {Path(__file__).name} their names")
            row[f"sm_{architecture}"] = asdict(one)
    order = {name: number for number, name in enumerate(KERNELS)}
    sorted_rows = sorted(rows.items(), key=lambda item: order.get(item[0], len(order)))
    return {name: dict(sorted(row.items(), key=lambda cell: int(cell[0][3:]))) for name, row in sorted_rows}


def wrong(name: str, resources: Mapping[str, Any]) -> list[str]:
    """What no compiler's version excuses, in words."""
    found = []
    if resources["spills"] or resources["stack"]:
        found.append(f"spills {resources['spills']} B, {resources['stack']} B of local memory")
    if resources["shared"]:
        found.append(f"{resources['shared']} B of static shared memory, which the plan does not know")
    if resources["registers"] < LEAST_REGISTERS:
        found.append(f"nothing is left of it: {resources['registers']} registers")
    products = name.split()[0] in DIRECTIONS
    for key, unit in (("products", "tensor-core product"), ("matrix_loads", "ldmatrix")):
        if products and resources[key] == 0:
            found.append(f"no {unit} is left in it")
    if name not in KERNELS:
        found.append(f"it is none of the kernels that {Path(__file__).name} knows; add it there")
    return found


def worse(now: Mapping[str, Row], stored: Mapping[str, Row], complete: bool, same_compiler: bool) -> list[str]:
    """What got worse than in a stored table's kernels, in words.

    Args:
        complete: `now` should hold all that is stored.
        same_compiler: else registers are not compared.
    """
    missing = sorted(set(stored) - set(now)) if complete else []
    found = [f"{name}: stored, but no longer compiled; write the table anew" for name in missing]
    for name, row in now.items():
        for architecture, resources in row.items():
            old = stored.get(name, {}).get(architecture)
            if old is None:
                found.append(f"{name} {architecture}: not in the stored table; write it anew")
            elif same_compiler and resources["registers"] > old["registers"] + SLACK:
                found.append(f"{name} {architecture}: {resources['registers']} registers, were {old['registers']}")
    return found


def plan_launches(kernels: Mapping[str, Row]) -> tuple[dict[str, Row], list[str]]:
    """The table's launches, of the architectures that `kernels` has, and what is wrong with them."""
    architectures = {architecture for row in kernels.values() for architecture in row}
    rows: dict[str, Row] = {}
    problems = []
    for query, plan in cuda_plan.plans().items():
        architecture = f"sm_{query.architecture}"
        kernel = kernels.get(query.kernel, {}).get(architecture)
        if architecture not in architectures or (kernel is None and not plan.refused):
            continue
        row = cuda_plan.launch_row(query, plan, kernel["registers"] if kernel else 0)
        rows.setdefault(query.name, {})[architecture] = row
        problems += [f"{query.name} {architecture}: {text}" for text in cuda_plan.wrong_launch(query, plan, row)]
    return rows, problems


def describe(name: str, row: Row) -> str:
    """One line of the printed table, of a kernel."""
    cells = []
    for architecture, r in row.items():
        counts = "" if r["products"] is None else f", {r['products']} HMMA, {r['matrix_loads']} LDSM"
        spilled = f", SPILLS {r['spills']}, LOCAL {r['stack']}" if r["spills"] or r["stack"] else ""
        cells.append(f"{architecture}: {r['registers']} reg{counts}{spilled}")
    return f"{name}: {'; '.join(cells)}"


def write(path: Path, table: Table) -> None:
    """Replace the stored table in one step; a line a kernel, and a launch."""

    def lines(rows: Mapping[str, Row]) -> str:
        return ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())

    text = (
        f'{{\n "nvcc": {json.dumps(table["nvcc"])},\n "kernels": {{\n{lines(table["kernels"])}\n }},\n'
        f' "launches": {{\n{lines(table["launches"])}\n }}\n}}\n'
    )
    from semeda_fast.files import atomic_path  # imports torch, which nothing else here needs

    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python csrc/tests/cuda_resources.py",
        description="Registers, local and shared memory, products, tiles and occupancy of every CUDA kernel.",
    )
    made.add_argument("--check", type=Path, metavar="FILE", help="compare with this table")
    made.add_argument("--write", type=Path, metavar="FILE", help="write the table; an existing one is replaced")
    made.add_argument("--only", default="", metavar="REGEX", help="on names of csrc/cuda/*.cu")
    made.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    made.add_argument("--quick", action="store_true", help="only the default proxy in half precision on sm_90")
    made.add_argument("--launches", action="store_true", help="compile nothing, take registers from the table")
    made.add_argument("--module", type=Path, metavar="FILE", help="compile nothing, read a built module")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    return made


def compiled(options: argparse.Namespace) -> tuple[dict[str, Row], str]:
    """Kernels as the command line asks for them, and the release of nvcc."""
    if options.module:
        return read_module(options.module)
    toolkit = nvcc.inspect(nvcc.find_nvcc(), nvcc.host_compiler())
    asked = options.arch or (QUICK if options.quick else ARCHITECTURES)
    unknown = sorted(set(asked) - (toolkit.machine_code & toolkit.ptx))
    if unknown:
        raise ResourcesError(
            f"nvcc {toolkit.version} does not compile for {', '.join(map(str, unknown))}; name others with --arch, or "
            "take a later toolkit (12.8 has all)"
        )
    if options.quick:
        return compile_kernels(toolkit, asked, QUICK_SOURCES, options.jobs, [QUICK_OPTION]), toolkit.version
    return compile_kernels(toolkit, asked, options.only, options.jobs), toolkit.version


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 0; 1: something is wrong, or worse than stored; 2: a bad call, or nothing to say."""
    made = parser()
    options = made.parse_args(arguments)
    part = bool(options.quick or options.only or options.arch or options.module)
    if options.write and part:
        made.error("--write stores the whole table; leave out --quick, --only, --arch and --module")
    if options.launches and (part or not (options.check or options.write)):
        made.error("--launches takes registers from the table of --check or --write, and no choice of kernels")
    if options.write and not options.launches and not find_cuobjdump():
        made.error("--write needs cuobjdump, to count instructions; NVIDIA's CUDA toolkit has it, and Triton")
    try:
        return report(options, part)
    except (ResourcesError, nvcc.CudaBuildError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def report(options: argparse.Namespace, part: bool) -> int:
    """Compile or read, compare, print and write; the command's exit code."""
    source = options.check or (options.write if options.launches else None)
    empty: Table = {"nvcc": "", "kernels": {}, "launches": {}}
    stored: Table = json.loads(source.read_text(encoding="utf-8")) if source else empty
    kernels, release = (stored["kernels"], stored["nvcc"]) if options.launches else compiled(options)
    launches, problems = plan_launches(kernels)
    for name, row in kernels.items():
        for architecture, resources in row.items():
            problems += [f"{name} {architecture}: {text}" for text in wrong(name, resources)]
        print(describe(name, row))
    for name, row in launches.items():
        print(cuda_plan.describe(name, row))
    if options.check:
        same = release == stored["nvcc"]
        problems += worse(kernels, stored["kernels"], not part, same)
        if same:
            problems += cuda_plan.worse_launches(launches, stored["launches"], not part)
        else:
            print(f"stored by nvcc {stored['nvcc']}, this is {release or 'unknown'}: registers are not compared")
    if options.write:
        write(options.write, {"nvcc": release, "kernels": kernels, "launches": launches})
    count = 0 if options.launches else sum(map(len, kernels.values()))
    print(f"{count} compiled, {sum(map(len, launches.values()))} planned, {len(problems)} problems")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
