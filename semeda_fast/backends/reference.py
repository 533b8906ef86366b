"""The definition of the loss in plain PyTorch: the oracle of every test and of every benchmark.

Never optimised. Written after Chen, Dapogny, Cord: SEMEDA, Pattern Recognition 108 (2020), doi
10.1016/j.patcog.2020.107557. For logits z [N,C,H,W], labels y [N,H,W], validity v = (y != ignore_index):

    p      = softmax_C(z) * v                      void pixels are the zero vector on both branches
    q      = onehot_C(y) * v
    t_l(x) = conv_l(a_{l-1}(x)) + b_l              zero "same" padding; a_0 = x
    a_l(x) = relu(t_l(x))
    phi_l  = t_l (tap "pre") or a_l (tap "post")
    D_l    = 1 / (V K_l s_l) * sum_{valid pixels} sum_{k < K_l} rho(phi_l(p) - phi_l(q))
    loss   = lambda_ce * CE + lambda_semeda * sum_l w_l D_l

A layer that works at 1/f of the resolution (stride or pooling) is read at the pixels (f i, f j), and each of
its positions counts for the f^2 pixels that it stands for; f = 1 is the formula above.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import size_of
from ..spec import LossSpec, LossTerms


def loss_terms(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: LossSpec,
) -> LossTerms:
    """Cross-entropy and SEMEDA terms of section 1, before the division by the number of valid pixels.

    Args:
        logits: [N,C,H,W] ([N,1,H,W] in binary mode), or probabilities where spec.from_logits is False; of any
            size where spec.upsample.
        target: [N,H,W] integer labels, or a float distribution shaped like p.
        valid: [N,H,W] bool, True where a pixel counts, or None; combined with target != ignore_index.
        class_weight: [C], or [P,C]: image i has row i % P; or None.
        weights, biases: [K_l, K_{l-1}, k, k] and [K_l] of each layer.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    soft = target.is_floating_point()
    v, bad = validity(logits, target, valid, spec)
    v_plane = v.unsqueeze(1)
    z = logits.to(dtype)
    if spec.upsample and z.shape[2:] != v.shape[1:]:
        z = upsampled(z, v.shape[1:])

    # Replaced before anything is computed, so that not even a NaN under a void pixel gets anywhere.
    z = torch.where(v_plane, z, 0.0)
    if spec.from_logits:
        if spec.mode == "binary":
            z = torch.cat([torch.zeros_like(z), z], dim=1)  # softmax([0, z]) = [1 - sigma(z), sigma(z)]
        log_p = torch.log_softmax(z, dim=1)
        p = torch.softmax(z, dim=1) * v_plane
    else:
        p = (torch.cat([1 - z, z], dim=1) if spec.mode == "binary" else z) * v_plane
        log_p = p.clamp_min(torch.finfo(dtype).tiny).log()

    if soft:
        q = torch.where(v_plane, target.to(dtype), 0.0)
        if spec.mode == "binary" and size_of(target, 1) == 1:
            q = torch.cat([1 - q, q], dim=1) * v_plane
        y = None
    else:
        y = torch.where((v & ~bad).unsqueeze(1), target.unsqueeze(1).to(torch.int64), 0)
        q = torch.zeros_like(p).scatter(1, y, 1.0) * v_plane

    ce_map, ce_weight = cross_entropy_map(log_p, y, q, v, class_weight, spec.label_smoothing)
    layer_maps = distance_maps(p, q, v, weights, biases, spec)

    # A label outside the classes must never pass for a result: where no check stopped it, it makes a NaN.
    poison = torch.where(bad, torch.nan, torch.ones((), dtype=dtype, device=z.device))
    ce_map = ce_map * poison
    semeda_map = poison * sum_in_order([w * m for w, m in zip(spec.layer_weights, layer_maps, strict=True)])
    per_layer = torch.stack([m.detach().sum() for m in layer_maps])
    return LossTerms(
        ce=ce_map if spec.per_pixel else ce_map.sum(),
        semeda=semeda_map if spec.per_pixel else semeda_map.sum(),
        per_layer=per_layer,
        ce_weight=ce_weight,
        valid_count=v.sum(),
    )


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [N,C,h,w] at the labels' size (H, W), bilinearly, corners not aligned: what most training scripts do.

    Formula: torch.nn.functional.interpolate.
    """
    return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)


def validity(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """v [N,H,W] bool, and which valid pixels hold a label that is no class ([N,H,W] bool)."""
    n, h, w = target.shape[0], *target.shape[-2:]
    v = torch.ones((n, h, w), dtype=torch.bool, device=logits.device) if valid is None else valid
    if target.is_floating_point():
        return v, torch.zeros_like(v)
    v = v & not_ignored(target, spec.ignore_index)
    num_classes = 2 if spec.mode == "binary" else logits.shape[1]
    labels = target.to(torch.int64)  # uint8 labels would wrap the number 256 to 0
    return v, v & ((labels < 0) | (labels >= num_classes))


def not_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """target != ignore_index, true everywhere where the labels' dtype cannot hold ignore_index."""
    low, high = (0, 1) if target.dtype == torch.bool else _limits(target.dtype)
    if low <= ignore_index <= high:
        # torch compares unsigned integers of 16 bits and more on some devices only.
        narrow = target.dtype not in (torch.uint16, torch.uint32, torch.uint64)
        return (target if narrow else target.to(torch.int64)) != ignore_index
    # Compared as they are, uint8 labels would wrap -100 to 156 and lose class 156.
    return torch.ones_like(target, dtype=torch.bool)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def cross_entropy_map(
    log_p: Tensor,
    y: Tensor | None,
    q: Tensor,
    v: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """torch.nn.functional.cross_entropy(reduction="none") [N,H,W], and the divisor of its mean [].

    y are labels [N,1,H,W] (q is then their one-hot map), or None: then q [N,C,H,W] is the distribution.
    """
    num_classes = log_p.shape[1]
    weight = torch.ones(num_classes, dtype=log_p.dtype, device=log_p.device)
    if class_weight is not None:
        weight = class_weight.to(log_p.dtype)
    by_image = weight.dim() == 2
    if by_image:
        plane = weight.repeat(log_p.shape[0] // weight.shape[0], 1)[:, :, None, None]
    else:
        plane = weight.reshape(1, -1, 1, 1)
    if y is None:
        smoothed = (1 - label_smoothing) * q + label_smoothing / num_classes
        loss = -(plane * smoothed * log_p).sum(dim=1)
        divisor = v.sum().to(log_p.dtype)  # torch divides by the number of pixels here, weights or not
    else:
        picked = log_p.gather(1, y)  # not (q * log_p).sum(): 0 * -inf is NaN
        y_weight = plane.expand_as(log_p).gather(1, y) if by_image else weight[y]
        loss = -((1 - label_smoothing) * y_weight * picked).squeeze(1)
        if label_smoothing > 0:
            loss = loss - label_smoothing / num_classes * (plane * log_p).sum(dim=1)
        divisor = torch.where(v.unsqueeze(1), y_weight, 0.0).sum()
    return torch.where(v, loss, 0.0), divisor


def distance_maps(
    p: Tensor, q: Tensor, v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: LossSpec
) -> list[Tensor]:
    """1 / (K_l s_l) * sum_k rho(phi_l(p) - phi_l(q)) of each layer as [N,H,W], zero at void pixels."""
    phi_p = features(p, weights, biases, spec.strides, spec.dilations, spec.pools, spec.tap)
    phi_q = features(q, weights, biases, spec.strides, spec.dilations, spec.pools, spec.tap)
    maps, factor = [], 1
    for layer, (a, b) in enumerate(zip(phi_p, phi_q, strict=True)):
        factor *= spec.strides[layer] * max(1, abs(spec.pools[layer]))
        channels = size_of(a, 1)  # for torch.jit.trace a tensor, whose product with the scale would be fp32
        m = rho(a - b, spec.distance).sum(dim=1) / (channels * spec.layer_scales[layer])
        if factor > 1:
            full = torch.zeros(v.shape, dtype=m.dtype, device=m.device)
            rows, columns = v[:, ::factor, ::factor].shape[1:]
            # Pooling drops a last, incomplete window; a strided convolution keeps it.
            m = F.pad(m, (0, columns - m.shape[2], 0, rows - m.shape[1])) * factor**2
            full[:, ::factor, ::factor] = m
            m = full
        maps.append(torch.where(v, m, 0.0))
    return maps


def features(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    strides: Sequence[int],
    dilations: Sequence[int],
    pools: Sequence[int],
    tap: str,
) -> list[Tensor]:
    """phi_l(x) [N,K_l,H_l,W_l] of every layer, for x [N,C,H,W]."""
    taps, a = [], x
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        window, dilation = pools[layer], dilations[layer]
        if window > 1:
            a = F.max_pool2d(a, window)
        elif window < -1:
            a = F.avg_pool2d(a, -window)
        padding = tuple(dilation * (size // 2) for size in weight.shape[2:])
        t = F.conv2d(a, weight.to(a.dtype), bias.to(a.dtype), strides[layer], padding, dilation)
        a = torch.relu(t)
        taps.append(t if tap == "pre" else a)
    return taps


def rho(d: Tensor, distance: str) -> Tensor:
    """The distance of one feature, elementwise; its derivative at 0 is 0. smooth-l1 has beta = 1."""
    if distance == "l1":
        return d.abs()
    if distance == "l2":
        return d * d
    if distance == "smooth_l1":
        return F.smooth_l1_loss(d, torch.zeros_like(d), reduction="none", beta=1.0)
    raise ValueError(f"distance must be 'l1', 'l2' or 'smooth_l1', got {distance!r}")


def sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    """The sum from the first to the last, so that two runs add in the same order."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
