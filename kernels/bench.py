"""Every kernel of one step by itself, ready to be timed: the hook of benchmarks/gpu/layers.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends.config import FusedConfig, config_text, parse_config
from semeda_fast.backends.fused import why_not_fused
from semeda_fast.backends.triton import INTERPRETER_TILE, interpreted
from semeda_fast.spec import LossSpec

from .launch import Inputs, Launch, backward_launches, forward_launches, run_all
from .model import total, works
from .plan import TILE, Plan, make_plan

REGION = 61, 127  # rows and columns of one class in the labels, prime, so that edges fall anywhere in a tile
VOID = 255
NAMES = {
    "softmax_fwd_kernel": "softmax",
    "tile_class_kernel": "tile classes",
    "sum_kernel": "reduction",
    "finish_kernel": "reduction",
    "logits_bwd_kernel": "dgrad 1",
}
VOID_SHARE = 0.02  # of the regions


class LayerCase(NamedTuple):
    """One thing to time.

    Attributes:
        name: "forward l" or "dgrad l" of layer l = 1..L, or "softmax", "tile classes", "reduction", "prepare forward",
            "prepare backward". "dgrad 1" holds the softmax's backward and the cross-entropy gradient.
        run: launches it on the current stream, as often as one likes, and waits for nothing.
        bytes: compulsory traffic of one run, with the mixed tiles that these labels have.
        flop: dense products of the prediction's branch alone, which is what a convolution by itself computes; ours
            computes the target's branch, too, on mixed tiles.
    """

    name: str
    run: Callable[[], None]
    bytes: int
    flop: int


@torch.no_grad()
def layer_cases(proxy: EdgeProxy, n: int, h: int, w: int, dtype: torch.dtype) -> Sequence[LayerCase]:
    """The kernels of one step on [n, C, h, w] logits, in the order in which the step runs them.

    Each kernel runs once here, so that it is compiled and its successors find real inputs; all buffers stay allocated.

    Args:
        proxy: on the device to time; under TRITON_INTERPRET=1 the CPU.
        dtype: of the logits: float32, bfloat16 or float16; see `storage_dtype` for that of the features.

    Raises:
        ValueError: a proxy or dtype that the kernels do not take.
    """
    reason = why_not_fused(proxy.weights, *_geometry(proxy))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"they take float32, bfloat16 and float16 logits, not {dtype}"
    if reason:
        raise ValueError(f"the Triton kernels cannot be timed on this: {reason}")
    config = _config(proxy)
    inputs = _inputs(proxy, n, h, w, dtype)
    tile = INTERPRETER_TILE if interpreted() else TILE
    plan = make_plan(config, (n, h, w), dtype, False, tile)
    with _on(inputs.logits):
        forward, backward = _launched(plan, inputs)
    shares = _mixed_shares(forward)
    traffic = [*works(forward, shares), *works(backward)]
    dense = [*works(forward, 0.0), *works(backward)]
    result = []
    for name, (launches, at) in _grouped(forward, backward).items():
        here = slice(at, at + len(launches))
        run = functools.partial(_run, launches, inputs.logits)
        result.append(LayerCase(name, run, total(traffic[here]).bytes, total(dense[here]).useful))
    return result


def _geometry(proxy: EdgeProxy) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    layers = proxy.layers
    return tuple(x.stride for x in layers), tuple(x.dilation for x in layers), tuple(x.pool for x in layers)


def _config(proxy: EdgeProxy) -> FusedConfig:
    spec = LossSpec(
        tuple(proxy.layer_weights),
        tuple(proxy.layer_scales(proxy.distance)),
        *_geometry(proxy),
        tap=proxy.tap,
        distance=proxy.distance,
        ignore_index=_void(proxy.num_classes),
    )
    return parse_config(config_text(proxy.weights, spec, False))


def _void(classes: int) -> int:
    return VOID if classes <= VOID else -100


def _inputs(proxy: EdgeProxy, n: int, h: int, w: int, dtype: torch.dtype) -> Inputs:
    """Random logits, and labels in regions of one class, some of them void; the same in every run on one device."""
    device = proxy.weights[0].device
    generator = torch.Generator(device).manual_seed(0)
    classes = proxy.num_classes
    logits = torch.randn((n, classes, h, w), generator=generator, device=device).to(dtype)
    coarse = (n, -(-h // REGION[0]), -(-w // REGION[1]))
    labels = torch.randint(0, classes, coarse, generator=generator, device=device)
    labels[torch.rand(coarse, generator=generator, device=device) < VOID_SHARE] = _void(classes)
    target = labels.repeat_interleave(REGION[0], 1).repeat_interleave(REGION[1], 2)[:, :h, :w].contiguous()
    flat = torch.cat([tensor.reshape(-1).float() for tensor in (*proxy.weights, *proxy.biases)])
    return Inputs(logits, target, None, None, flat)


def _launched(plan: Plan, inputs: Inputs) -> tuple[list[Launch], list[Launch]]:
    """The launches of both directions, each of which ran once."""
    new = inputs.logits.new_empty
    codes = new(plan.code_offsets[-1], dtype=torch.uint8)
    saved = new(plan.saved_offsets[-1], dtype=plan.dtype)
    outputs: dict[str, Tensor | None] = {
        "terms": new(3 + len(plan.layers), dtype=torch.float32),
        "counts": new(2, dtype=torch.int64),
        "codes": codes,
        "saved": saved,
        "ce_map": None,
        "semeda_map": None,
    }
    precision = "ieee" if torch.version.hip is not None else "tf32x3"
    forward = list(forward_launches(plan, inputs, outputs, precision))
    run_all(forward)
    d = torch.full((1,), 1 / plan.pixels, dtype=torch.float32, device=inputs.logits.device)
    d_logits = torch.empty_like(inputs.logits)
    backward = list(backward_launches(plan, inputs, codes, saved, d, d, d_logits, precision))
    run_all(backward)
    return forward, backward


def _mixed_shares(forward: Sequence[Launch]) -> list[float]:
    """Of each layer with a target branch: the share of tiles that compute it. Waits for the device."""
    for launch in forward:
        if launch.kernel.__name__ == "tile_class_kernel":
            classes: Tensor = launch.arguments["classes"]
            return [float(share) for share in (classes < 0).float().mean(dim=1).tolist()]
    return []


def _grouped(forward: Sequence[Launch], backward: Sequence[Launch]) -> dict[str, tuple[list[Launch], int]]:
    """Name -> launches that are timed together, and at which number of both lists together they begin."""
    layers = sum(launch.kernel.__name__ == "layer_fwd_kernel" for launch in forward)
    groups: dict[str, tuple[list[Launch], int]] = {}
    number = {"layer_fwd_kernel": 0, "layer_bwd_kernel": layers + 1}
    for at, launch in enumerate([*forward, *backward]):
        kernel = launch.kernel.__name__
        if kernel == "layer_fwd_kernel":
            number[kernel] += 1
            name = f"forward {number[kernel]}"
        elif kernel == "layer_bwd_kernel":
            number[kernel] -= 1
            name = f"dgrad {number[kernel]}"
        elif kernel == "prepare_kernel":
            name = f"prepare {'forward' if at < len(forward) else 'backward'}"
        else:
            name = NAMES[kernel]
        groups.setdefault(name, ([], at))[0].append(launch)
    return groups


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: it becomes the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _run(launches: Sequence[Launch], like: Tensor) -> None:
    with _on(like):
        run_all(launches)
