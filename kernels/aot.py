"""Compiles launches ahead of time for a GPU that need not be there, and reads off what the compiler made of them.

python -m semeda_fast.kernels.aot                       # a table of all kernels and configurations
python -m semeda_fast.kernels.aot --check FILE.json     # exit code 1 where something got worse than in the file
python -m semeda_fast.kernels.aot --write FILE.json
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

from semeda_fast.config import FusedConfig

from .launch import Inputs, Launch, backward_launches, forward_launches
from .plan import make_plan

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block, CUDA C++ programming guide
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
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
    """

    registers: int
    spills: int
    stack: int
    shared: int
    products: str


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
    yield "post-l2-maps", make_config(default, tap="post", distance="l2", per_pixel=True), half, False, False
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
    for number, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if name in fixed or value is None:
            signature[name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
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
    registers, stack, spills = _ptxas(text, compiled.metadata.ptx_version, architecture)
    return Resources(registers, spills, stack, compiled.metadata.shared, products.split(".")[0])


@functools.cache
def _ptxas_path(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(architecture).path)


def _ptxas(ptx: str, version: int | None, architecture: int) -> tuple[int, int, int]:
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


def label(case: str, number: int, launch: Launch) -> str:
    """Names one launch in a table: its kernel, channels and warps."""
    arguments = launch.arguments
    sizes = "-".join(str(arguments[key]) for key in ("IN", "OUT", "BLOCK_C") if key in arguments)
    return f"{case}/{number:02d} {launch.kernel.__name__.removesuffix('_kernel')} {sizes} {launch.num_warps}w"


def table(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """Launch -> architecture -> resources; a launch that compiles like one before is left out."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    seen: set[str] = set()
    for case, config, dtype, soft, channels_last in cases():
        for number, launch in enumerate(launches_of(config, dtype, soft, channels_last)):
            source = source_of(launch)
            key = f"{source.name} {source.signature} {source.constants} {launch.num_warps} {launch.num_stages}"
            name = label(case, number, launch)
            if key in seen or not re.search(only, name):
                continue
            seen.add(key)
            rows[name] = {f"sm_{a}": asdict(compile_launch(launch, a)) for a in architectures}
            print(describe(name, rows[name]), flush=True)
    return rows


def describe(name: str, row: dict[str, dict[str, Any]]) -> str:
    """One line of the printed table."""
    cells = [
        f"{a}: {r['registers']} reg, {r['shared']} B, {r['products'] or '-'}"
        + (f", SPILLS {r['spills']}, LOCAL {r['stack']}" if r["spills"] or r["stack"] else "")
        for a, r in row.items()
    ]
    return f"{name}: {'; '.join(cells)}"


def worse(now: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What got worse than in a stored table, in words; registers may differ by 8, as between compiler versions."""
    found = []
    for name in sorted(set(stored) - set(now)):
        found.append(f"{name}: no longer launched; write the table anew")
    for name, row in now.items():
        for architecture, resources in row.items():
            limit = SHARED_LIMIT[int(architecture[3:])]
            if resources["spills"] or resources["stack"]:
                found.append(f"{name} {architecture}: spills {resources['spills']} B, local {resources['stack']} B")
            if resources["shared"] > limit:
                found.append(f"{name} {architecture}: {resources['shared']} B shared memory, the limit is {limit}")
            old = stored.get(name, {}).get(architecture)
            if old is None:
                found.append(f"{name} {architecture}: not in the stored table; write it anew")
                continue
            if resources["registers"] > old["registers"] + 8:
                found.append(f"{name} {architecture}: {resources['registers']} registers, were {old['registers']}")
            if resources["shared"] > old["shared"] * 1.1:
                found.append(f"{name} {architecture}: {resources['shared']} B shared memory, were {old['shared']}")
            if resources["products"] != old["products"]:
                found.append(f"{name} {architecture}: products by {resources['products']!r}, were {old['products']!r}")
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="", help="a regular expression on names of launches")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    args = parser.parse_args()
    rows = table(tuple(args.arch or ARCHITECTURES), args.only)
    if args.write:
        args.write.write_text(json.dumps({"triton": triton.__version__, "launches": rows}, indent=1) + "\n")
    if args.check:
        problems = worse(rows, json.loads(args.check.read_text())["launches"])
        print("\n".join(problems))
        return 1 if problems else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
