"""The first use of a backend on a GPU: a tiny image, both directions, compared with the reference.

A compiler or a driver that fails, or computes something else, is found here and not in somebody's training run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..spec import LossSpec
from .config import FusedConfig, config_text, parse_config
from .fused import FusedOps
from .problem import Problem
from .reference import loss_terms

TRIAL_SIZE = (40, 100)  # for tiles of all kernels: with and without label edges, inside and at the border


def first_use(ops: FusedOps, logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """Why a backend does not work for such a loss on the logits' device, or None; one trial serves all sizes.

    Looks at metadata only. While a CUDA graph is captured there is no time for a trial, and none is made.
    """
    if logits.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    order = torch.channels_last if logits.stride(1) == 1 else torch.contiguous_format
    return trial(ops, config_text(weights, spec, False), logits.dtype, order, logits.device)


@functools.cache
def trial(
    ops: FusedOps, config: str, dtype: torch.dtype, order: torch.memory_format, device: torch.device
) -> str | None:
    """Why the kernels do not run on a device, or not as they should; found out on a tiny image. None where they do.

    Kernels are compiled for no particular size, so the first real call finds them compiled. Waits for the device.
    """
    # A compiler may be tracing (tensors would be fakes), or the caller may be under inference mode or autocast.
    ours = torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad()
    watched = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if watched:
            torch.cuda.set_sync_debug_mode(0)  # this one waits, once
        with _disable_current_modes(), ours[0], ours[1], ours[2]:
            found = _disagreement(ops, parse_config(config), dtype, order, device)
    except Exception as error:  # each version of a compiler and each driver fails in its own way
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{ops.whose} do not compile or run on {device}: {type(error).__name__}: {first}"
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode(watched)
    return found and f"{ops.whose} compute wrong values on {device}: {found}; please report this"


def _disagreement(
    ops: FusedOps, config: FusedConfig, dtype: torch.dtype, order: torch.memory_format, device: torch.device
) -> str | None:
    """What the kernels and the reference do not agree on by far, for a random proxy."""
    generator = torch.Generator().manual_seed(0)  # not the caller's
    height, width = TRIAL_SIZE
    classes = config.channels[0]
    channels = 1 if config.mode == "binary" else classes
    logits = torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32).to(device, dtype)
    logits = logits.contiguous(memory_format=order)
    target = torch.zeros((1, height, width), dtype=torch.int64, device=device)
    target[:, height // 2 :, -width // 8 :] = min(1, classes - 1)  # an edge, and tiles without one
    weights, biases = [], []
    for before, out, size in zip(config.channels, config.channels[1:], config.sizes, strict=False):
        weight = torch.randn((out, before, size, size), generator=generator, dtype=torch.float32)
        weights.append((weight / (size * before**0.5)).to(device))
        biases.append(torch.randn(out, generator=generator, dtype=torch.float32).to(device))
    flat = torch.cat([tensor.reshape(-1) for tensor in (*weights, *biases)])
    leaf = logits.clone().requires_grad_()
    ones = (1,) * len(config.sizes)
    spec = replace(config, strides=ones, dilations=ones, pools=(0,) * len(ones))
    expected = loss_terms(leaf, target, None, None, weights, biases, spec)
    (expected.ce.sum() + expected.semeda.sum()).backward()
    assert leaf.grad is not None

    problem = Problem(logits, target, None, None, flat, config)
    outputs = ops.outputs(logits, target, config, True)
    d_logits = torch.empty_like(logits)
    ops.forward(problem, outputs)
    one = torch.ones_like(outputs.ce)
    ops.backward(problem, outputs.codes, outputs.saved_d, one, one, d_logits)
    pairs = {
        "cross-entropy": (outputs.ce, expected.ce.detach(), 1e-2),
        "the SEMEDA term": (outputs.semeda, expected.semeda.detach(), 1e-2),
        "the gradient": (d_logits, leaf.grad, 1e-1),  # L1 flips signs where differences lie within rounding
    }
    for name, (got, wanted, tolerance) in pairs.items():
        error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30)
        if not error <= tolerance:  # NaN, too
            return f"{name} is off by {float(error):.2g} of its size"
    return None
