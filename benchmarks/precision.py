"""What half-precision activations do to the gradient: the choice of fp16 over bf16 in the Triton kernels.

    python -m benchmarks.precision [--size 256]

Computes SEMEDA's gradient in float64 as (1') to (10) of kernels/README.md, with every operand of a convolution rounded
to a dtype, and prints its relative L2 distance from the unrounded one. bf16 logits, labels as in all workloads.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import HEADLINE, PROXIES, Inputs, make_inputs


def gradient(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """d_p through the softmax, [N,C,H,W] float64, for unit layer weights; L1, tap before the ReLU."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    proxy, classes = inputs.proxy, inputs.workload.num_classes
    valid = (inputs.target != inputs.workload.ignore_index).unsqueeze(1)
    labels = torch.where(valid.squeeze(1), inputs.target, 0)
    q = F.one_hot(labels, classes).permute(0, 3, 1, 2).double() * valid
    s = torch.softmax(inputs.logits.double(), dim=1)
    weights = [rounded(weight.double()) for weight in proxy.weights]
    x, xq = rounded(s * valid - q), q
    signs, masks = [], []
    for weight, bias in zip(weights, proxy.biases, strict=True):
        pad = weight.shape[2] // 2
        d = F.conv2d(x, weight, padding=pad)
        target = F.conv2d(xq, weight, bias.double(), padding=pad)
        signs.append(torch.sign(d) * valid)
        masks.append(target + d > 0)
        x, xq = rounded((target + d).relu() - target.relu()), rounded(target.relu())
    d_a: Tensor | None = None
    scales = proxy.layer_scales("l1")
    for number in reversed(range(len(weights))):
        weight = weights[number]
        d_t = signs[number] / (weight.shape[0] * scales[number])
        if d_a is not None:
            d_t = d_t + masks[number] * d_a
        d_a = F.conv_transpose2d(rounded(d_t), weight, padding=weight.shape[2] // 2)
    assert d_a is not None
    d_p = d_a * valid
    return s * (d_p - (s * d_p).sum(dim=1, keepdim=True))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="height and width of the image")
    size = parser.parse_args().size
    for name in PROXIES:
        inputs = make_inputs(HEADLINE.replace(batch=1, height=size, width=size, proxy=name, dtype="bfloat16"))
        exact = gradient(inputs, torch.float64)
        for dtype in (torch.bfloat16, torch.float16):
            error = float((gradient(inputs, dtype) - exact).norm() / exact.norm())
            print(f"{name} proxy, {str(dtype).removeprefix('torch.')} operands: gradient off by {error:.1e}")


if __name__ == "__main__":
    main()
