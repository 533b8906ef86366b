"""What csrc/cuda/plan.cpp decides for each architecture's device, and how much of a multiprocessor that fills.

Compiles cuda_plan.cpp with the host's compiler, in a second; neither nvcc nor a GPU is needed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# No contraction of a * b + c: plans compare estimates, and are to be the same everywhere.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-pthread")
SOURCES = ("csrc/tests/cuda_plan.cpp", "csrc/cuda/plan.cpp")
KIB = 1 << 10
PROXIES = {
    (16, 32, 2): "default",
    (16, 32, 32, 2): "four-layer",
    (32, 64, 64): "wide",
    (16, 32, 32, 32, 32, 32, 16): "deep",
}
# Dataset -> N, C, H, W, as in benchmarks/gpu/bench.py.
DATASETS = {"voc": (16, 21, 513, 513), "ade20k": (8, 150, 512, 512)}

# Of every architecture from sm_80 to sm_120, CUDA C++ programming guide, technical specifications per compute
# capability; granularities as in NVIDIA's occupancy calculator.
REGISTERS = 64 * KIB  # of a multiprocessor
REGISTER_UNIT = 256  # a warp's registers are a multiple of it
WARP_UNIT = 4  # a multiprocessor's quarters have the same number of warps
SHARED_UNIT = 128  # bytes
SHARED_RESERVED = KIB  # bytes of each block that the driver keeps for itself
LANES = 32

Row = dict[str, Any]  # "sm_90" -> what launch_row() makes


@dataclass(frozen=True)
class Device:
    """A GPU of an architecture, as far as a plan depends on it.

    Attributes:
        name: of the product whose multiprocessors are counted.
        shared_per_block: bytes, with opt-in.
        shared_per_multiprocessor: bytes.
        warps: that fit on a multiprocessor.
    """

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int


DEVICES = {
    80: Device("A100", 108, 163 * KIB, 164 * KIB, 64),
    86: Device("RTX 3090", 82, 99 * KIB, 100 * KIB, 48),
    89: Device("L4", 58, 99 * KIB, 100 * KIB, 48),
    90: Device("H100", 132, 227 * KIB, 228 * KIB, 64),
    100: Device("B200", 148, 227 * KIB, 228 * KIB, 64),
    120: Device("RTX 5090", 170, 99 * KIB, 100 * KIB, 48),
}
ARCHITECTURES = tuple(DEVICES)


class Query(NamedTuple):
    """One launch of a main kernel."""

    architecture: int
    dataset: str
    proxy: tuple[int, ...]
    half: bool
    backward: bool

    @property
    def kernel(self) -> str:
        """The kernel's name, as in cuda_resources.py."""
        return f"{'backward' if self.backward else 'forward'} {PROXIES[self.proxy]} {'half' if self.half else 'tf32'}"

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.kernel}"

    @property
    def line(self) -> str:
        """The query as the program reads it."""
        device, (n, c, h, w) = DEVICES[self.architecture], DATASETS[self.dataset]
        facts = (device.multiprocessors, device.shared_per_block, device.shared_per_multiprocessor)
        numbers = (*facts, n, c, h, w, self.half, self.backward, len(self.proxy), *self.proxy)
        return " ".join(str(int(number)) for number in numbers)


def queries() -> Iterator[Query]:
    """Every architecture, dataset, proxy, kind of numbers and direction."""
    for dataset in DATASETS:
        for backward in (False, True):
            for half in (True, False):
                for proxy in PROXIES:
                    yield from (Query(architecture, dataset, proxy, half, backward) for architecture in DEVICES)


def find_compiler() -> list[str]:
    """The command of CXX, else g++, else clang++, else nothing."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (named[:1] or ["g++", "clang++"]) if (path := shutil.which(name))]
    return [found[0], *named[1:]] if found else []


def ask(lines: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """Compile the program and let it answer.

    Raises:
        RuntimeError: there is no compiler, the sources do not compile, or a line is bad.
    """
    compiler = find_compiler()
    if not compiler:
        raise RuntimeError("csrc/cuda/plan.cpp needs g++ or clang++; install one, or name it with CXX=...")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "cuda_plan"))
        command = [*compiler, *FLAGS, *(str(root / source) for source in SOURCES), "-o", program]
        for step, text in ((command, ""), ([program], lines)):
            done = subprocess.run(step, input=text, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"`{shlex.join(step)}` failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


class Plan(NamedTuple):
    """What plan.cpp decides for one launch.

    Attributes:
        tile: its rows and columns.
        shared: bytes of dynamic shared memory a block.
        resident: the layers' weights stay in shared memory from tile to tile.
        blocks: of a multiprocessor, as the plan would have it.
        warps: of a block.
        refused: "", or why there is no launch; the rest means nothing then.
    """

    tile: tuple[int, int] = (0, 0)
    shared: int = 0
    resident: bool = False
    blocks: int = 0
    warps: int = 0
    refused: str = ""


def plans(root: Path = ROOT) -> dict[Query, Plan]:
    """The plan of every query."""
    asked = list(queries())
    answers = ask("".join(f"{query.line}\n" for query in asked), root)
    return {query: _plan(answer, query) for query, answer in zip(asked, answers, strict=True)}


def _plan(answer: Mapping[str, Any], query: Query) -> Plan:
    if "refused" in answer:
        return Plan(refused=answer["refused"])
    # Blocks are persistent: as many are launched as run at once.
    blocks = -(-answer["blocks"] // DEVICES[query.architecture].multiprocessors)
    tile = (answer["rows"], answer["columns"])
    return Plan(tile, answer["shared"], answer["resident"], blocks, answer["warps"])


def residency(device: Device, registers: int, shared: int, block_warps: int) -> dict[str, int]:
    """Blocks that fit on a multiprocessor, by what limits them.

    Args:
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
    """
    warp = _round_up(registers * LANES, REGISTER_UNIT)
    warps = REGISTERS // warp // WARP_UNIT * WARP_UNIT
    return {
        "shared memory": device.shared_per_multiprocessor // _round_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "registers": warps // block_warps,
        "warps": device.warps // block_warps,
    }


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def launch_row(query: Query, plan: Plan, registers: int) -> dict[str, Any]:
    """What the table holds of one launch on one architecture."""
    if plan.refused:
        return {"refused": plan.refused}
    device = DEVICES[query.architecture]
    limits = residency(device, registers, plan.shared, plan.warps) | {"plan": plan.blocks}
    limit = min(limits, key=lambda key: limits[key])
    warps = limits[limit] * plan.warps
    return {
        "tile": f"{plan.tile[0]}x{plan.tile[1]}",
        "shared": plan.shared,
        "resident": plan.resident,
        "blocks": limits[limit],
        "limit": limit,
        "warps": warps,
        "occupancy": round(warps / device.warps, 3),
    }


def wrong_launch(query: Query, plan: Plan, row: Mapping[str, Any]) -> list[str]:
    """What must not be, in words."""
    found: list[str] = []
    if plan.refused:
        return found
    if plan.shared > DEVICES[query.architecture].shared_per_block:
        limit = DEVICES[query.architecture].shared_per_block
        found.append(f"{plan.shared} B of shared memory, a block has {limit}")
    elif row["blocks"] < plan.blocks:
        found.append(f"planned for {plan.blocks} blocks a multiprocessor, {row['limit']} allow {row['blocks']}")
    return found


def worse_launches(now: Mapping[str, Row], stored: Mapping[str, Row], complete: bool) -> list[str]:
    """How launches differ from a stored table, in words; plans have no tolerance.

    Args:
        complete: `now` should hold all that is stored.
    """
    again = "write the table anew with --launches"
    missing = sorted(set(stored) - set(now)) if complete else []
    found = [f"{name}: stored, but no longer planned; {again}" for name in missing]
    for name, row in now.items():
        for architecture, launch in row.items():
            old, where = stored.get(name, {}).get(architecture), f"{name} {architecture}"
            if old is None:
                found.append(f"{where}: not in the stored table; {again}")
            elif launch.get("blocks", 0) < old.get("blocks", 0):
                found.append(f"{where}: {launch.get('blocks', 0)} blocks a multiprocessor, were {old['blocks']}")
            elif launch != old:
                found.append(f"{where}: {describe_launch(launch)}, was {describe_launch(old)}; {again}")
    return found


def describe(name: str, row: Row) -> str:
    """One line of the printed table."""
    reasons = {launch.get("refused") for launch in row.values()}
    if len(reasons) == 1 and None not in reasons:
        return f"{name}: refused: {reasons.pop()}"
    return f"{name}: {'; '.join(f'{a}: {describe_launch(launch)}' for a, launch in row.items())}"


def describe_launch(row: Mapping[str, Any]) -> str:
    """One launch on one architecture, in words."""
    if "refused" in row:
        return "refused"
    weights = "resident" if row["resident"] else "reloaded"
    return (
        f"{row['tile']}, {row['shared']} B, weights {weights}, {row['blocks']} blocks ({row['limit']}), "
        f"{row['occupancy']:.1%}"
    )
