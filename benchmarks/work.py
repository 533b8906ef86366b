"""Arithmetic and traffic of a workload, from its geometry alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .workloads import PROXIES, Workload

KERNEL_SIZE = 3  # of all proxies in PROXIES


@dataclass(frozen=True)
class Work:
    """Per pixel. A fused multiply-add is 2 FLOP.

    Attributes:
        pass_flops: one dense pass through the proxy, sum_l 2 k^2 K_{l-1} K_l; borders are not taken off.
        flops: forward of the prediction, forward of the target, backward to the input: three such passes.
            Softmax, distances and cross-entropy are not counted. A backend that skips work (the target's
            convolutions where the labels are constant, Winograd) does less than this.
        bytes: logits and labels read once, the gradient written once.
    """

    pass_flops: int
    flops: int
    bytes: int


def work_of(workload: Workload, mode: str = "fwdbwd") -> Work:
    """The dense work of a workload; without the backward pass in the modes "nograd" and "forward"."""
    widths, last = PROXIES[workload.proxy]
    channels = [workload.num_classes, *widths, last]
    per_pass = sum(2 * KERNEL_SIZE**2 * a * b for a, b in itertools.pairwise(channels))
    logits = workload.logit_channels * torch.empty((), dtype=workload.torch_dtype).element_size()
    labels = 8  # int64
    backward = mode == "fwdbwd"
    return Work(per_pass, per_pass * (3 if backward else 2), logits * (2 if backward else 1) + labels)


def activation_bytes(workload: Workload) -> int:
    """Estimated memory of the eager reference in bytes: what it keeps and holds at once, in fp32.

    About 6 maps as wide as the logits, and on both branches each feature before and after the ReLU, with
    its gradient and a difference: 4 values. Checked against measured peaks to within a factor of 2.
    """
    widths, last = PROXIES[workload.proxy]
    return 4 * workload.pixels * (6 * workload.num_classes + 4 * (sum(widths) + last))
