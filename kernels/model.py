"""Bytes and matrix products of a launch, counted from its own arguments.

    python -m semeda_fast.kernels.model                                  # a table of the default proxy
    python -m semeda_fast.kernels.model --proxy wide --classes 21 --dtype bf16 --mixed 0.45 --shape 16 513 513

Bytes are compulsory: each element of each tensor once, as if caches held the rest. What the caches must serve beside
is stated apart (`Work.cached`): the rim of shifted pixels around each tile, and the weights, which every program reads.
A fused multiply-add is 2 FLOP; only matrix products are counted. On tiles within one class the target's branch takes
its features from a table, so the share of mixed tiles, near label edges or the image's border, is a parameter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semeda_fast.backends.config import FusedConfig

from .launch import Inputs, Launch, backward_launches, forward_launches
from .plan import make_plan

MIXED = 0.45  # of tiles of 4 x 32 pixels: CamVid at 480 x 360, counted in tests/test_triton_model.py
PROXIES = {"default": (16, 32, 2), "wide": (32, 64, 64), "deep": (16, 32, 32, 32, 32, 32, 16)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes a pixel, forward and backward of 21 classes, half precision: what the design set out for.
PLANNED = {"default": 500, "wide": 1500}


@dataclass(frozen=True)
class Work:
    """Of one launch, or of several.

    Attributes:
        read, written: compulsory bytes.
        cached: bytes read again, by neighbouring tiles and for the weights; L2 or L1 should serve them.
        useful: FLOP of the matrix products on real pixels and channels.
        executed: FLOP as executed: padded channels and pixels, three tf32 products for one of fp32.
    """

    read: int = 0
    written: int = 0
    cached: int = 0
    useful: int = 0
    executed: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Access:
    """What a kernel does with its tensor arguments, by name.

    Attributes:
        reads, writes: each element once.
        mixed: of these, what is touched on mixed tiles alone.
        shifted: of these, what is read around the tile, too.
        weights: of these, what every program reads.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    mixed: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


ACCESS = {
    "prepare_kernel": Access(("weight", "bias", "before"), ("packed", "packed_bias", "table", "activated")),
    "softmax_fwd_kernel": Access(
        ("logits", "target", "valid", "class_weight"), ("e", "q", "labels", "partial", "ce_map", "semeda_map")
    ),
    "tile_class_kernel": Access(("labels",), ("classes",), shifted=("labels",)),
    "layer_fwd_kernel": Access(
        ("x_in", "xq", "labels", "prev_classes", "classes", "prev_activated", "table", "packed", "bias", "semeda_map"),
        ("b", "aq", "codes", "saved", "partial", "semeda_map"),
        mixed=("xq", "aq"),
        shifted=("x_in", "xq"),
        weights=("packed",),
    ),
    "layer_bwd_kernel": Access(
        ("d_t", "codes", "saved", "prev_codes", "prev_saved", "upstream", "packed"),
        ("d_prev",),
        shifted=("d_t", "codes", "saved"),
        weights=("packed",),
    ),
    "logits_bwd_kernel": Access(
        ("logits", "target", "valid", "class_weight", "d_t", "packed", "d_ce", "d_semeda"),
        ("d_logits",),
        shifted=("d_t",),
        weights=("packed",),
    ),
    "sum_kernel": Access(("partial",), ("sums",)),
    "finish_kernel": Access(("sums",), ("terms", "counts")),
}


def work_of(launch: Launch, channels: tuple[int, int] | None = None, mixed: float = MIXED) -> Work:
    """The work of one launch.

    Args:
        channels: real input and output channels of the layer, of which a launch knows the padded ones alone; needed
            for its useful FLOP, see `works`.
        mixed: share of mixed tiles, in [0, 1]; 1 where the target is a distribution.

    Raises:
        ValueError: a kernel, or a tensor argument, that this model does not know.
    """
    name = launch.kernel.__name__
    if name not in ACCESS:
        raise ValueError(
            f"no model of kernel {name!r}: describe what it reads and writes in ACCESS of kernels/model.py"
        )
    access = ACCESS[name]
    arguments = _touched(name, launch.arguments)
    unknown = [key for key in arguments if key not in access.reads + access.writes]
    if unknown:
        raise ValueError(
            f"no model of argument {unknown[0]!r} of kernel {name!r}: add it to ACCESS of kernels/model.py"
        )
    share = mixed if launch.arguments.get("classes") is not None else 1.0
    size = {
        key: round(_bytes(key, tensor, launch) * (share if key in access.mixed else 1))
        for key, tensor in arguments.items()
    }
    cached = sum((halo(launch) - 1) * size[key] for key in access.shifted if key in size)
    cached += sum((launch.programs - 1) * size[key] for key in access.weights if key in size)
    useful, executed = _products(launch, channels, share)
    return Work(
        sum(size[key] for key in access.reads if key in size),
        sum(size[key] for key in access.writes if key in size),
        round(cached),
        useful,
        executed,
    )


def _touched(name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensor arguments that the kernel does not leave alone."""
    found = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    if name == "layer_bwd_kernel" and "d_t" in found:  # the seeds of the last layer alone come from its codes
        found.pop("codes", None)
        found.pop("saved", None)
    if name == "layer_bwd_kernel" and "d_t" not in found and arguments["DISTANCE"] == 0:
        found.pop("saved", None)
    if name == "logits_bwd_kernel" and arguments["MAPS"]:
        del found["d_semeda"]
    return found


def _bytes(key: str, tensor: Tensor, launch: Launch) -> int:
    """Of all elements that the launch touches of a tensor."""
    count = tensor.numel()
    if (
        key == "partial" and launch.kernel.__name__ != "sum_kernel"
    ):  # a number a program; rows are as long as the longest
        count = launch.programs * (4 if tensor.dim() == 2 else 1)
    return count * tensor.element_size()


def halo(launch: Launch) -> float:
    """Pixels read of a shifted operand over pixels of the tile."""
    a = launch.arguments
    if "BLOCK_H" not in a:
        return 1.0
    rim = 2 * a["REACH"] if "REACH" in a else a["KSIZE"] - 1 if "KSIZE" in a else 0
    return (a["BLOCK_H"] + rim) * (a["BLOCK_W"] + rim) / (a["BLOCK_H"] * a["BLOCK_W"])


def _products(launch: Launch, channels: tuple[int, int] | None, share: float) -> tuple[int, int]:
    """FLOP of the matrix products, useful and executed."""
    a = launch.arguments
    if "KSIZE" not in a:
        return 0, 0
    columns = a["BLOCK_C"] if "BLOCK_C" in a else a["IN"]
    each = 2 * a["KSIZE"] ** 2
    has_target = "LAST" in a and (a["POST"] or not a["LAST"])
    branches = 1 + share * has_target
    exact = 3 if a["DTYPE"] == tl.float32 and a["PRECISION"] == "tf32x3" else 1
    executed = each * columns * a["OUT"] * launch.programs * a["BLOCK_H"] * a["BLOCK_W"] * branches * exact
    if channels is None:
        return 0, round(executed)
    pixels = a["H"] * a["W"] * (launch.programs // a["tiles_per_image"])
    return round(each * channels[0] * channels[1] * pixels * branches), round(executed)


def works(launches: Sequence[Launch], mixed: float | Sequence[float] = MIXED) -> list[Work]:
    """The work of each launch of a forward or backward pass, which holds the launches that pack the weights.

    Args:
        mixed: share of mixed tiles; or one share a layer with a target branch.
    """
    real = {}
    for launch in launches:
        if launch.kernel.__name__ == "prepare_kernel":
            real[id(launch.arguments["packed"])] = launch.arguments["C"], launch.arguments["K"]
    shares = iter(mixed) if not isinstance(mixed, float | int) else None
    result = []
    for launch in launches:
        channels = real.get(id(launch.arguments.get("packed")))
        share = float(mixed) if isinstance(mixed, float | int) else 1.0
        if shares is not None and launch.arguments.get("classes") is not None and "KSIZE" in launch.arguments:
            share = next(shares)
        result.append(work_of(launch, channels, share))
    return result


def total(work: Iterable[Work]) -> Work:
    """The sum."""
    return sum(work, Work())


def make_config(channels: tuple[int, ...], **options: Any) -> FusedConfig:
    """A configuration of a proxy of 3x3 layers: C, K_1, ..., K_L, tap "pre", L1; `options` set other fields."""
    layers = len(channels) - 1
    defaults: dict[str, Any] = {
        "channels": channels, "sizes": (3,) * layers, "layer_weights": (1.0,) * layers,
        "layer_scales": (1.0,) * layers, "tap": "pre", "distance": "l1", "ignore_index": 255,
        "label_smoothing": 0.0, "mode": "multiclass", "reduction": "mean",
    }  # fmt: skip
    return FusedConfig(**{**defaults, **options})


def passes_of(
    config: FusedConfig,
    dtype: torch.dtype,
    soft: bool = False,
    channels_last: bool = False,
    shape: tuple[int, int, int] = (2, 72, 160),
) -> tuple[list[Launch], list[Launch]]:
    """What forward and backward would launch, on tensors without memory; shape = (N, H, W)."""
    n, h, w = shape
    channels = 1 if config.mode == "binary" else config.channels[0]
    order = torch.channels_last if channels_last else torch.contiguous_format
    logits = torch.empty((n, channels, h, w), dtype=dtype, device="meta").contiguous(memory_format=order)
    new = logits.new_empty
    target = new((n, channels, h, w), dtype=torch.float32) if soft else new((n, h, w), dtype=torch.int64)
    plan = make_plan(config, shape, dtype, soft)
    inputs = Inputs(logits, target, None, None, new(config.parameters, dtype=torch.float32))
    maps = (n, h, w) if config.per_pixel else (1,)
    codes, saved = new(plan.code_offsets[-1], dtype=torch.uint8), new(plan.saved_offsets[-1], dtype=plan.dtype)
    outputs: dict[str, Tensor | None] = {
        "terms": new(3 + len(plan.layers), dtype=torch.float32),
        "counts": new(2, dtype=torch.int64),
        "codes": codes,
        "saved": saved,
        "ce_map": new(maps, dtype=torch.float32) if config.per_pixel else None,
        "semeda_map": new(maps, dtype=torch.float32) if config.per_pixel else None,
    }
    d = new(maps, dtype=torch.float32)
    forward = forward_launches(plan, inputs, outputs, "tf32x3")
    backward = backward_launches(plan, inputs, codes, saved, d, d, torch.empty_like(logits), "tf32x3")
    return list(forward), list(backward)


def describe(launches: Sequence[Launch], work: Sequence[Work], pixels: int) -> list[str]:
    """Lines of a table, everything per pixel."""
    lines = []
    for launch, one in zip(launches, work, strict=True):
        sizes = "-".join(str(launch.arguments[key]) for key in ("IN", "OUT") if key in launch.arguments)
        lines.append(_line(f"{launch.kernel.__name__.removesuffix('_kernel')} {sizes}", one, pixels, halo(launch)))
    return lines


def _line(name: str, work: Work, pixels: int, rim: float | None = None) -> str:
    read, written, cached, useful, executed = (getattr(work, field.name) / pixels for field in fields(work))
    factor = "" if rim is None else f"{rim:.2f}"
    return (
        f"{name:<22}{read:>9.1f}{written:>9.1f}{read + written:>9.1f}{factor:>7}{cached:>9.1f}"
        f"{useful:>11.0f}{executed:>11.0f}"
    )


HEADER = (
    f"{'per pixel':<22}{'read B':>9}{'write B':>9}{'total B':>9}{'halo':>7}{'cached B':>9}{'FLOP':>11}{'executed':>11}"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m semeda_fast.kernels.model", description="Bytes and FLOP a pixel of every launch."
    )
    made.add_argument("--proxy", choices=PROXIES, default="default")
    made.add_argument("--classes", type=int, default=21)
    made.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the logits")
    made.add_argument("--mixed", type=float, default=MIXED, help="share of tiles near label edges, in [0, 1]")
    made.add_argument("--shape", type=int, nargs=3, default=(16, 513, 513), metavar=("N", "H", "W"))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 2 for a bad call."""
    made = parser()
    options = made.parse_args(arguments)
    if not 0 <= options.mixed <= 1:
        made.error(f"--mixed is a share in [0, 1], got {options.mixed}")
    n, h, w = options.shape
    config = make_config((options.classes, *PROXIES[options.proxy]))
    passes = passes_of(config, DTYPES[options.dtype], shape=(n, h, w))
    pixels = n * h * w
    print(
        f"{options.proxy} proxy, {options.classes} classes, {options.dtype} logits, {n}x{h}x{w}, "
        f"{100 * options.mixed:.0f} % mixed tiles; Triton {triton.__version__}\n{HEADER}"
    )
    sums = []
    for name, launches in zip(("forward", "backward"), passes, strict=True):
        work = works(launches, options.mixed)
        sums.append(total(work))
        print("\n".join(describe(launches, work, pixels)))
        print(_line(name.upper(), sums[-1], pixels))
    print(_line("ALL", total(sums), pixels))
    planned = PLANNED.get(options.proxy) if options.classes == 21 and options.dtype != "fp32" else None
    if planned:
        print(f"planned: about {planned} B a pixel; this is {total(sums).bytes / pixels / planned:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
