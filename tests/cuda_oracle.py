"""What the CUDA kernels have to compute, in float64 PyTorch, with what rounding may change of each number.

Errors are standard deviations: rounding of many operands adds up like noise, and its largest possible sum is as large
as the features themselves behind three layers. A number may differ by SIGMAS of them.

`features` and `d_probabilities` follow section 1 of kernels/README.md. Nothing is shared with the kernels but the
layout of codes, which csrc/cuda/codes.h documents and `decode` reads by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIGMAS = 4.0  # seen: up to 1.4 where a sign is wrong, up to 2.4 in a gradient
FP32_SUM = 2.0**-22  # of a product's operands: sums of some hundred products in fp32, and exp


class Rounding(NamedTuple):
    """Of a product's operands, both together: relative, and the absolute error of the smallest numbers."""

    relative: float
    smallest: float

    @staticmethod
    def of(dtype: torch.dtype) -> Rounding:
        """Operands are fp16 for half-precision logits, each off by up to 2^-11; three tf32 products keep 2^-22."""
        return Rounding(2.0**-22, 0.0) if dtype == torch.float32 else Rounding(2.0**-11, 2.0**-25)


class Network(NamedTuple):
    """A proxy in float64: weights [K_l, K_{l-1}, 3, 3], biases [K_l], 1 / (K_l s_l) and w_l / (K_l s_l)."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    inverse: Sequence[float]
    coefficients: Sequence[float]
    post: bool


class Layer(NamedTuple):
    """Features of a layer [N,K,H,W] and errors; distance is t(p) - t(q), or behind the ReLUs."""

    positive: Tensor  # t(p) > 0
    positive_sure: Tensor  # rounding cannot change it
    distance: Tensor
    distance_error: Tensor


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def product_error(x: Tensor, error: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """Error of convolve(x, weight) where x has one already and operands are rounded."""
    size = weight.abs().clamp_min(2.0**-14)  # below, fp16 rounds to a multiple of 2^-24
    smallest = rounding.smallest * (x != 0)  # zeros are exact
    operands = ((rounding.relative + FP32_SUM) * x.abs() + smallest).square() + error.square()
    return convolve(operands, size.square()).sqrt()


def features(p: Tensor, q: Tensor, network: Network, rounding: Rounding) -> list[Layer]:
    """All layers of both branches."""
    d, d_error = p - q, FP32_SUM * (p + q)
    a_q, q_error = q, torch.zeros_like(q)
    d_in, layers = d, []
    for number, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        d, d_error = convolve(d_in, weight), product_error(d_in, d_error, weight, rounding)
        # The first layer adds up columns of weights in fp32, and a table is fp32 all through.
        exact = Rounding(0.0, 0.0) if number == 0 else rounding
        t_q = convolve(a_q, weight) + bias[:, None, None]
        q_error = product_error(a_q, q_error, weight, exact) + FP32_SUM * (t_q.abs() + bias.abs()[:, None, None])
        t_p, error = t_q + d, (d_error.square() + q_error.square()).sqrt()
        margin = SIGMAS * error
        on, off = (t_p > margin) & (t_q > margin), (t_p < -margin) & (t_q < -margin)
        b = t_p.relu() - t_q.relu()
        b_error = torch.where(on, d_error, torch.where(off, 0.0, error))
        shown = (b, b_error) if network.post else (d, d_error)
        layers.append(Layer(t_p > 0, t_p.abs() > margin, *shown))
        d_in, d_error, a_q = b, b_error, t_q.relu()
    return layers


class Codes(NamedTuple):
    """Bits of a layer, bool [N,K,H,W]; `on` is None for the last."""

    on: Tensor | None
    above: Tensor
    below: Tensor


def decode(codes: Tensor, shape: tuple[int, ...], channels: Sequence[int]) -> list[Codes]:
    """Bits of csrc/cuda/codes.h: planes [pixels][K / 8] bytes, lane t of 4 has channels 8j + 2t + i as bits 2j + i."""
    data, at, found = codes.numpy(), 0, []
    n, h, w = shape
    pixels = n * h * w
    for number, k in enumerate(channels):
        last = number == len(channels) - 1
        if k < 8:
            bits = np.unpackbits(data[at : at + pixels].reshape(pixels, 1), axis=1, bitorder="little")
            planes = [bits[:, 0:k], bits[:, k : 2 * k]]
            assert not bits[:, 2 * k :].any(), "bits of channels that there are not"
            at += pixels
        else:
            channel = np.arange(k)
            j, t, i = channel // 8, channel % 8 // 2, channel % 2
            places = t * (k // 4) + 2 * j + i
            planes = []
            for _ in range(2 if last else 3):
                plane = data[at : at + pixels * (k // 8)].reshape(pixels, k // 8)
                planes.append(np.unpackbits(plane, axis=1, bitorder="little")[:, places])
                at += pixels * (k // 8)
        maps = [torch.from_numpy(plane.astype(bool).reshape(n, h, w, k)).permute(0, 3, 1, 2) for plane in planes]
        found.append(Codes(None, *maps) if last else Codes(*maps))
    assert at == len(data), f"{len(data)} bytes of codes where the layers have {at}"
    return found


def d_probabilities(codes: Sequence[Codes], network: Network, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """d_p [N,C,H,W] of the distances' sum, from bits alone, and its error."""
    unit = max(network.coefficients)
    d_t = error = torch.zeros(())
    for number in range(len(codes) - 1, -1, -1):
        on, above, below = codes[number]
        seed = network.coefficients[number] * (above.double() - below.double())
        if on is None:
            d_t, error = seed, torch.zeros_like(seed)
        else:
            d_t, error = on * d_t + seed, on * error
        turned = network.weights[number].flip(2, 3).transpose(0, 1)
        error = unit * product_error(d_t / unit, error / unit, turned, rounding)
        d_t = convolve(d_t, turned)
    return d_t, error
