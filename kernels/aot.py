"""Compiles launches ahead of time for a GPU that need not be there, and reads off what the compiler made of them.

    python -m semeda_fast.kernels.aot                       # a table of all kernels and configurations
    python -m semeda_fast.kernels.aot --check FILE.json     # exit code 1 where something is wrong, or worse than there
    python -m semeda_fast.kernels.aot --quick --check ...   # of the launches that matter most alone
    python -m semeda_fast.kernels.aot --write FILE.json

What is wrong by itself: local memory, more shared memory than a block may have, products on another unit than the
architecture's, a kernel of which the compiler left nothing. What is worse than stored: registers and shared memory,
which are compared where the table was written with the same Triton.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semeda_fast.backends.config import FusedConfig
from semeda_fast.backends.triton import interpreted
from semeda_fast.files import atomic_path

from .launch import Launch
from .model import make_config, passes_of

ARCHITECTURES = (80, 90, 100)
# Bytes a block, CUDA C++ programming guide; 163 KiB on sm_80 itself, but 99 on sm_86 and sm_89, which run its code.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
LEAST_PIXELS = 64  # of a program, for the units of sm_90 and sm_100; the others take mma
LEAST_REGISTERS = 16  # fewer: the compiler has proved that the kernel does nothing, rightly or not
SLACK = 8  # registers by which a kernel may grow
# Architecture -> launches that `--quick` compiles: half precision on sm_90; elsewhere what needs the most.
QUICK = {
    90: r"^default/|^wide/.*(layer|logits)",
    80: r"^wide-fp32/.*(layer|logits)|^classes-64/.*logits",
    100: r"^wide/.*(layer|logits)|^classes-256-fp32/.*logits",
}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint16: "*u16",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes:
        registers: of a thread.
        spills: bytes of spill stores and loads, from ptxas.
        stack: bytes of local memory a thread.
        shared: bytes a block.
        products: the kind of tensor-core instruction: "wgmma", "tcgen05", "mma" or "" for none.
        stores: instructions that store to global memory.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    products: str
    stores: int


def cases() -> Iterator[tuple[str, FusedConfig, torch.dtype, bool, bool]]:
    """Name, configuration, logits' dtype, whether the target is soft, whether logits are channels_last."""
    half, full = torch.bfloat16, torch.float32
    default = (21, 16, 32, 2)
    yield "default", make_config(default), half, False, False
    yield "default-channels_last", make_config(default), half, False, True
    yield "default-fp32", make_config(default), full, False, False
    yield "wide", make_config((21, 32, 64, 64)), half, False, False
    yield "wide-fp32", make_config((21, 32, 64, 64)), full, False, False
    yield "deep", make_config((21, 16, 32, 32, 16)), half, False, False
    yield "binary", make_config((2, 16, 32, 2), mode="binary"), half, False, False
    yield "classes-64", make_config((64, 16, 32, 2)), half, False, False
    yield "classes-150", make_config((150, 16, 32, 2)), half, False, False
    yield "classes-256-fp32", make_config((256, 16, 32, 2)), full, False, False
    yield "post-l2-maps", make_config(default, tap="post", distance="l2", reduction="none"), half, False, False
    yield "soft-smooth_l1", make_config(default, distance="smooth_l1"), half, True, False


def launches_of(
    config: FusedConfig, dtype: torch.dtype, soft: bool, channels_last: bool, shape: tuple[int, int, int] = (2, 72, 160)
) -> list[Launch]:
    """What forward and backward would launch, on tensors without memory."""
    forward, backward = passes_of(config, dtype, soft, channels_last, shape)
    return [*forward, *backward]


def source_of(launch: Launch) -> ASTSource:
    """The specialisation that Triton's launcher would compile: pointers on 16 bytes, numbers as they come."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    loose = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    for number, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if name in fixed or value is None:
            signature[name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(number,)] = [] if name in loose else [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for sm_<architecture> and read the resources off."""
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source_of(launch), target=target, options=options)
    text = compiled.asm["ptx"]
    products = next((kind for kind in ("tcgen05.mma", "wgmma.mma", "mma.sync") if kind in text), "")
    registers, stack, spills = _ptxas(text, architecture)
    return Resources(
        registers, spills, stack, compiled.metadata.shared, products.split(".")[0], text.count("st.global")
    )


@functools.cache
def _ptxas_path(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return str(get_ptxas(architecture).path)
    except TypeError:  # Triton 3.5 has one for all
        return str(get_ptxas().path)


def _ptxas(ptx: str, architecture: int) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes spilled."""
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            _ptxas_path(architecture),
            "-v",
            f"--gpu-name=sm_{architecture}{suffix}",
            str(path),
            "-o",
            os.devnull,
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"ptxas failed: {found.stderr}")
    registers = int(re.search(r"Used (\d+) registers", found.stderr)[1])  # type: ignore[index]
    stack, stores, loads = map(
        int,
        re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", found.stderr).groups(),  # type: ignore[union-attr]
    )
    return registers, stack, stores + loads


def expected_products(launch: Launch, architecture: int) -> str:
    """The unit that the launch's matrix products should run on, "" where it has none."""
    arguments = launch.arguments
    if "KSIZE" not in arguments:
        return ""
    few = arguments["BLOCK_H"] * arguments["BLOCK_W"] < LEAST_PIXELS
    return "mma" if few else PRODUCTS[architecture]


def unique_launches() -> dict[str, Launch]:
    """Name -> launch of all cases; one that compiles like one before is left out."""
    found: dict[str, Launch] = {}
    seen: set[str] = set()
    for case, config, dtype, soft, channels_last in cases():
        for number, launch in enumerate(launches_of(config, dtype, soft, channels_last)):
            source = source_of(launch)
            key = f"{source.name} {source.signature} {source.constants} {launch.num_warps} {launch.num_stages}"
            if key not in seen:
                seen.add(key)
                found[label(case, number, launch)] = launch
    return found


def label(case: str, number: int, launch: Launch) -> str:
    """Names one launch in a table: its kernel and channels."""
    arguments = launch.arguments
    sizes = "-".join(str(arguments[key]) for key in ("IN", "OUT", "BLOCK_C") if key in arguments)
    return f"{case}/{number:02d} {launch.kernel.__name__.removesuffix('_kernel')} {sizes}".rstrip()


def configuration(launch: Launch) -> str:
    """Pixels a program, warps and stages."""
    arguments = launch.arguments
    block = f"{arguments['BLOCK_H']}x{arguments['BLOCK_W']} " if "BLOCK_H" in arguments else ""
    return f"{block}{launch.num_warps} warps {launch.num_stages} stages"


Row = dict[str, Any]  # "config", and architecture -> the fields of Resources


def compile_table(wanted: dict[int, tuple[str, str]]) -> tuple[dict[str, Row], list[str]]:
    """Compile, print a line each, and return the table and what is wrong by itself.

    Args:
        wanted: architecture -> regular expressions, all of which a launch's name has to match.
    """
    rows: dict[str, Row] = {}
    problems = []
    for name, launch in unique_launches().items():
        row: Row = {"config": configuration(launch)}
        for architecture, patterns in wanted.items():
            if all(re.search(pattern, name) for pattern in patterns):
                resources = compile_launch(launch, architecture)
                row[f"sm_{architecture}"] = asdict(resources)
                expected = expected_products(launch, architecture)
                problems += [f"{name} sm_{architecture}: {text}" for text in wrong(resources, architecture, expected)]
        if len(row) > 1:
            rows[name] = row
            print(describe(name, row), flush=True)
    return rows, problems


def describe(name: str, row: Row) -> str:
    """One line of the printed table."""
    cells = [
        f"{a}: {r['registers']} reg, {r['shared']} B, {r['products'] or '-'}"
        + (f", SPILLS {r['spills']}, LOCAL {r['stack']}" if r["spills"] or r["stack"] else "")
        for a, r in row.items()
        if a != "config"
    ]
    return f"{name} ({row['config']}): {'; '.join(cells)}"


def wrong(resources: Resources, architecture: int, products: str) -> list[str]:
    """What no compiler's version excuses, in words."""
    found = []
    limit = SHARED_LIMIT[architecture]
    if resources.spills or resources.stack:
        found.append(f"spills {resources.spills} B, {resources.stack} B of local memory")
    if resources.shared > limit:
        found.append(f"{resources.shared} B of shared memory, a block has {limit}")
    if resources.products != products:
        found.append(f"products by {resources.products or 'nothing'!r}, expected {products or 'nothing'!r}")
    if resources.registers < LEAST_REGISTERS or not resources.stores:
        found.append(f"nothing is left of it: {resources.registers} registers, {resources.stores} global stores")
    return found


def worse(now: dict[str, Row], stored: dict[str, Row], complete: bool, same_compiler: bool) -> list[str]:
    """What got worse than in a stored table, in words.

    Args:
        complete: `now` should hold all that is stored.
        same_compiler: else registers and shared memory are not compared.
    """
    missing = sorted(set(stored) - set(now)) if complete else []
    found = [f"{name}: stored, but no longer launched; write the table anew" for name in missing]
    for name, row in now.items():
        for architecture, resources in row.items():
            if architecture == "config":
                continue
            old = stored.get(name, {}).get(architecture)
            where = f"{name} {architecture}"
            if old is None:
                found.append(f"{where}: not in the stored table; write it anew")
            elif same_compiler:
                if resources["registers"] > old["registers"] + SLACK:
                    found.append(f"{where}: {resources['registers']} registers, were {old['registers']}")
                if resources["shared"] > old["shared"] * 1.1:
                    found.append(f"{where}: {resources['shared']} B of shared memory, were {old['shared']}")
    return found


def write(path: Path, rows: dict[str, Row]) -> None:
    """Replace the stored table in one step; a line a launch."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{\n "triton": {json.dumps(triton.__version__)},\n "launches": {{\n{lines}\n }}\n}}\n'
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m semeda_fast.kernels.aot",
        description="Registers, local and shared memory, and the unit of the products of every kernel.",
    )
    made.add_argument("--check", type=Path, metavar="FILE", help="compare with this table")
    made.add_argument("--write", type=Path, metavar="FILE", help="write the table; an existing one is replaced")
    made.add_argument("--only", default="", metavar="REGEX", help="on names of launches")
    made.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    made.add_argument("--quick", action="store_true", help="only the launches that matter most")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 0; 1: something is wrong, or worse than stored; 2: a bad call."""
    made = parser()
    options = made.parse_args(arguments)
    if interpreted():
        made.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    part = bool(options.quick or options.only or options.arch)
    if options.write and part:
        made.error("--write stores the whole table; leave out --quick, --only and --arch")
    patterns = QUICK if options.quick else dict.fromkeys(ARCHITECTURES, "")
    wanted = {architecture: (patterns[architecture], options.only) for architecture in options.arch or patterns}
    rows, problems = compile_table(wanted)
    if options.write:
        write(options.write, rows)
    if options.check:
        stored = json.loads(options.check.read_text(encoding="utf-8"))
        same = stored["triton"] == triton.__version__
        if not same:
            print(f"stored by Triton {stored['triton']}, this is {triton.__version__}: sizes are not compared")
        problems += worse(rows, stored["launches"], not part, same)
    print(f"{sum(len(row) - 1 for row in rows.values())} compiled, {len(problems)} problems")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
