"""Section 1 of the design in NumPy and SciPy, float64, written from the formulas and not from the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import correlate
from scipy.special import log_softmax

Array = NDArray[np.float64]


class Layer(NamedTuple):
    """One convolution: weight [K,C,k,k], bias [K]."""

    weight: Array
    bias: Array


def rho(d: Array, distance: str) -> Array:
    """The distance of one feature."""
    if distance == "l1":
        return np.abs(d)
    if distance == "l2":
        return d**2
    return np.where(np.abs(d) < 1, 0.5 * d**2, np.abs(d) - 0.5)


def taps(x: Array, layers: Sequence[Layer], tap: str) -> list[Array]:
    """phi_l of one image x [C,H,W]."""
    result = []
    for layer in layers:
        k = layer.weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (k, k), (k, k)))
        t = np.stack([correlate(padded, w, mode="valid", method="direct")[0] for w in layer.weight])
        t += layer.bias[:, None, None]
        x = np.maximum(t, 0)
        result.append(t if tap == "pre" else x)
    return result


def maps(
    z: Array,
    q: Array,
    v: NDArray[np.bool_],
    layers: Sequence[Layer],
    *,
    scales: Sequence[float],
    tap: str,
    distance: str,
    probabilities: bool = False,
) -> list[Array]:
    """1 / (K_l s_l) sum_k rho(phi_l(p) - phi_l(q)), zero at void pixels: [L] of [N,H,W]."""
    result = [np.zeros(v.shape) for _ in layers]
    for n in range(len(z)):
        p = z[n] if probabilities else np.exp(log_softmax(np.where(v[n], z[n], 0), axis=0))
        a, b = taps(p * v[n], layers, tap), taps(q[n] * v[n], layers, tap)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            result[i][n] = np.where(v[n], rho(x - y, distance).sum(axis=0), 0) / (x.shape[0] * scales[i])
    return result


def cross_entropy(
    z: Array, q: Array, v: NDArray[np.bool_], weight: Array, smoothing: float, *, soft: bool
) -> tuple[Array, float]:
    """The [N,H,W] map of torch's cross_entropy as its documentation defines it, and the divisor of its mean."""
    c = z.shape[1]
    logp = log_softmax(np.where(v[:, None], z, 0), axis=1)
    smoothed = (1 - smoothing) * q + smoothing / c
    if soft:
        loss = -(weight[None, :, None, None] * smoothed * logp).sum(axis=1)
        return np.where(v, loss, 0), float(v.sum())
    y_weight = (q * weight[None, :, None, None]).sum(axis=1)
    hard = -(q * weight[None, :, None, None] * logp).sum(axis=1)
    uniform = -(weight[None, :, None, None] * logp).sum(axis=1)
    loss = (1 - smoothing) * hard + smoothing / c * uniform
    return np.where(v, loss, 0), float((y_weight * v).sum())


def one_hot(y: NDArray[np.int64], num_classes: int, v: NDArray[np.bool_]) -> Array:
    """onehot_C(y) * v as [N,C,H,W]."""
    q = np.zeros((y.shape[0], num_classes, *y.shape[1:]))
    for c in range(num_classes):
        q[:, c] = (y == c) & v
    return q
