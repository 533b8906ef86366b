"""The workloads that all suites share, by name: classes, proxy, dtype, labels, size; and their tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semeda_fast import EdgeProxy

from .labels import LabelFacts, make_labels

# name -> (C, mode). Binary: one logit channel, two classes.
DATASETS = {
    "voc": (21, "multiclass"),
    "cityscapes": (19, "multiclass"),
    "camvid": (11, "multiclass"),
    "ade20k": (150, "multiclass"),
    "binary": (2, "binary"),
}
# name -> (hidden widths, channels of the last layer). "default" is the bundled, trained one; the others are
# untrained with a fixed seed: the time does not depend on the weights' values.
PROXIES: dict[str, tuple[tuple[int, ...], int]] = {
    "default": ((16, 32), 2),
    "wide": ((32, 64), 64),
    "deep": ((16, 32, 32, 32, 32, 32), 16),
}
DTYPES = ("float32", "bfloat16", "float16")
# Both terms count alike, so that an error of either shows in the check; the time does not depend on them.
LAMBDA_CE, LAMBDA_SEMEDA = 1.0, 1.0


@dataclass(frozen=True)
class Workload:
    """One thing to compute: everything that decides the numbers, nothing about who computes it.

    Attributes:
        dataset: a name from DATASETS, or "custom" for another number of classes.
        num_classes: C of the labels and of the proxy (2 in binary mode, where the logits have one channel).
        proxy: a name from PROXIES.
        dtype: of the logits, a name from DTYPES.
        labels: a kind from `labels.KINDS`.
        batch, height, width: N, H, W in pixels.
        mode: "multiclass" or "binary".
        distance: of the SEMEDA term: "l1", "l2" or "smooth_l1".
    """

    dataset: str
    num_classes: int
    proxy: str = "default"
    dtype: str = "float32"
    labels: str = "camvid"
    batch: int = 2
    height: int = 512
    width: int = 512
    mode: str = "multiclass"
    distance: str = "l1"

    def __post_init__(self) -> None:
        if self.proxy not in PROXIES:
            raise ValueError(f"proxy must be one of {', '.join(PROXIES)}, got {self.proxy!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def name(self) -> str:
        """Such as "voc-default-float32-2x512x512-camvid"; unique, and the same in every run."""
        data = self.dataset if self.dataset != "custom" else f"c{self.num_classes}"
        proxy = self.proxy if self.distance == "l1" else f"{self.proxy}-{self.distance}"
        return f"{data}-{proxy}-{self.dtype}-{self.batch}x{self.height}x{self.width}-{self.labels}"

    @property
    def pixels(self) -> int:
        """N * H * W."""
        return self.batch * self.height * self.width

    @property
    def logit_channels(self) -> int:
        """Channels of the logits: C, or 1 in binary mode."""
        return 1 if self.mode == "binary" else self.num_classes

    @property
    def torch_dtype(self) -> torch.dtype:
        """The logits' dtype."""
        return getattr(torch, self.dtype)

    @property
    def ignore_index(self) -> int:
        """255 as in the datasets, or -100 where 255 is a class."""
        return 255 if self.num_classes <= 255 else -100

    @property
    def grad_scale(self) -> float:
        """What the loss's gradient starts from: 2^16 for fp16 (GradScaler's start), where 1 would underflow."""
        return 65536.0 if self.dtype == "float16" else 1.0

    def replace(self, **changes: Any) -> Workload:
        """This workload with other fields."""
        return dataclasses.replace(self, **changes)


def named(dataset: str, **changes: Any) -> Workload:
    """The workload of a dataset's name; `changes` set other fields.

    Raises:
        ValueError: a name that is not in DATASETS.
    """
    if dataset not in DATASETS:
        raise ValueError(f"workload must be one of {', '.join(DATASETS)}, got {dataset!r}")
    num_classes, mode = DATASETS[dataset]
    return Workload(dataset, num_classes, mode=mode).replace(**changes)


def with_classes(num_classes: int, **changes: Any) -> Workload:
    """A workload of any number of classes; 1 is binary mode."""
    if num_classes == 1:
        return named("binary", **changes)
    return Workload("custom", num_classes).replace(**changes)


HEADLINE = named("voc")  # N=2, 512x512, labels from CamVid


@dataclass(frozen=True)
class Inputs:
    """The tensors of a workload on one device.

    Attributes:
        logits: [N,C,H,W] contiguous (NCHW), without gradient.
        target: [N,H,W] int64.
        proxy: frozen, fp32.
        facts: what is in the labels.
    """

    workload: Workload
    logits: Tensor
    target: Tensor
    proxy: EdgeProxy
    facts: LabelFacts

    def leaf(self, layout: str) -> Tensor:
        """The logits as a leaf that wants a gradient, in "nchw" or "channels_last" memory order; a copy."""
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return self.logits.detach().clone(memory_format=form).requires_grad_()


def make_proxy(workload: Workload) -> EdgeProxy:
    """The proxy of a workload, the same on every machine."""
    widths, last = PROXIES[workload.proxy]
    if workload.proxy != "default":
        return EdgeProxy(workload.num_classes, widths, edge_classes=last, seed=0, distance=workload.distance)
    proxy = EdgeProxy.bundled(workload.num_classes)
    if workload.distance == proxy.distance:
        return proxy
    parts = (proxy.layers, proxy.weights, proxy.biases)
    return EdgeProxy.from_tensors(*parts, tap=proxy.tap, distance=workload.distance, scales=proxy.scales)


def make_inputs(workload: Workload, device: str = "cpu") -> Inputs:
    """Tensors like those of a half-trained network: noise plus a bump on labels shifted by 2 x 3 pixels.

    The bump 1 + ln C gives the shifted label about 0.6 of the probability for any C, so that the softmax is
    neither uniform nor saturated. Drawn on the CPU with a fixed seed, then cast and moved.
    """
    proxy = make_proxy(workload)
    size = (workload.batch, workload.height, workload.width)
    void = workload.ignore_index
    target, facts = make_labels(workload.labels, workload.num_classes, size, void, proxy.receptive_field)
    generator = torch.Generator().manual_seed(1)
    shape = (workload.batch, workload.logit_channels, workload.height, workload.width)
    logits = torch.randn(shape, generator=generator)
    guess = torch.where(target == void, 0, target).roll((2, 3), dims=(1, 2)).unsqueeze(1)
    if workload.mode == "binary":
        logits += 3.0 * guess - 1.5
    else:
        bump = torch.full(guess.shape, 1 + math.log(workload.num_classes))
        logits.scatter_add_(1, guess, bump)
    return Inputs(
        workload, logits.to(device, workload.torch_dtype), target.to(device), proxy.to(torch.device(device)), facts
    )
