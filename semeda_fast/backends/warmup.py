"""Compile ahead: what `SemedaLoss.warmup` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def warmup(
    criterion: Any,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    channels_last: bool = False,
    labels_dtype: torch.dtype = torch.int64,
) -> float:
    """Run the loss once forward and backward, and once without a gradient, so that the first step compiles nothing.

    Kernels are compiled for what the code depends on: the loss's options, dtypes, memory layout and device, but no
    size; one call serves every batch and image size. Calls that pass `valid_mask` have kernels of their own, which
    compile at the first such call. Nothing of the caller's is changed: random numbers come from a generator of its
    own, and no `.grad` is written. Where nothing is compiled, as on the CPU, it is a harmless call.

    Args:
        criterion: the SemedaLoss, already on the device and with the options of the training run.
        shape: of the logits, (N, C, H, W), (N, 1, H, W) in binary mode. The largest of the training run lets the
            allocator reserve its memory, too; a small one is enough for compilation.
        dtype: of the logits: bfloat16 or float16 where the network runs under autocast.
        device: of the logits; default: where the criterion is.
        channels_last: whether the logits will be in that memory format.
        labels_dtype: of the labels; a floating-point dtype stands for a distribution [N, C, H, W].

    Returns:
        the seconds that it took, with all work on the device done.

    Raises:
        ValueError, TypeError: a shape or dtype that the loss does not take.
        BackendUnavailableError: the backend named in the criterion cannot run here.
    """
    sizes = tuple(int(size) for size in shape)
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"shape must be that of the logits, four sizes (N, C, H, W) of at least 1, got {sizes}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is that of the logits and must be a floating-point one, got {dtype}")
    where = criterion.proxy.weights[0].device if device is None else torch.device(device)
    begun = time.perf_counter()
    # The caller may be in no_grad or in a region of autocast: this is about the dtype that was named.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(where.type, enabled=False):
        logits, target = _inputs(criterion, sizes, dtype, where, channels_last, labels_dtype)
        # forward, not a call of the module: hooks are the caller's
        loss = criterion.forward(logits.requires_grad_(), target)
        assert isinstance(loss, Tensor)
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
        with torch.no_grad():
            criterion.forward(logits, target)
    if where.type != "cpu":
        torch.accelerator.synchronize(where)
    return time.perf_counter() - begun


def _inputs(
    criterion: Any,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    labels_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits (or probabilities) and labels (or a distribution), from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)
    n, channels, height, width = sizes
    logits = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32)
    if not criterion.from_logits:
        logits = logits.sigmoid() if criterion.mode == "binary" else logits.softmax(dim=1)
    order = torch.channels_last if channels_last else torch.contiguous_format
    logits = logits.to(dtype).contiguous(memory_format=order)
    if labels_dtype.is_floating_point:
        soft = torch.rand(sizes, generator=generator, device=device, dtype=torch.float32)
        return logits, (soft if channels == 1 else soft.softmax(dim=1)).to(labels_dtype)
    classes = 2 if criterion.mode == "binary" else channels
    if labels_dtype != torch.bool:
        classes = min(classes, torch.iinfo(labels_dtype).max + 1)
    labels = torch.randint(0, classes, (n, height, width), generator=generator, device=device)
    return logits, labels.to(labels_dtype)
