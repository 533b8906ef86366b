"""Random configurations: backend "cpu" against the reference, value and gradient, by the error budget.

The examples are the same in every run. `SEMEDA_FAST_FUZZ=2000 pytest tests/test_fuzz.py` runs 2000 examples that
differ from run to run instead; a failure prints the smallest configuration that fails, and how to get it again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cpu_budget import Judge, loss_and_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends import registry as backends
from semeda_fast.proxy.record import ProxyLayer

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)
EXAMPLES = int(os.environ.get("SEMEDA_FAST_FUZZ", "0"))
LABELS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
LAYOUTS = ["nchw", "channels_last", "sliced", "transposed", "expanded"]


@dataclass(frozen=True)
class Problem:
    """One configuration; tensors are made from `seed`, so that a printed example is all there is to know."""

    n: int
    classes: int
    height: int
    width: int
    layers: tuple[tuple[int, int], ...]  # output channels and kernel size
    tap: str
    distance: str
    dtype: torch.dtype
    layout: str
    scale: float  # of the logits
    target: str  # "hard", "soft", or "constant": one label everywhere
    labels: torch.dtype
    void: float
    masked: float
    binary: bool
    weighted: bool
    seed: int
    small: tuple[int, int] | None  # of logits that are scaled up
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[Tensor, Tensor, EdgeProxy, dict[str, Any]]:
        """logits [N,C,H,W], target, proxy, and the keyword arguments of semeda_loss."""
        generator = torch.Generator().manual_seed(self.seed)
        n, c, h, w = self.n, self.classes, self.height, self.width
        channels = 1 if self.binary else c
        size = self.small or (h, w)
        logits = (self.scale * torch.randn(n, channels, *size, generator=generator)).to(self.dtype)
        options = dict(self.options)
        if self.small:
            options["upsample"] = "bilinear"
        if self.masked:
            options["valid_mask"] = torch.rand(n, h, w, generator=generator) >= self.masked
        if self.weighted:
            options["weight"] = 0.1 + torch.rand(c, generator=generator)
        if self.binary:
            options["mode"] = "binary"
        return lay_out(logits, self.layout), self.make_target(generator, options), self.make_proxy(generator), options

    def make_target(self, generator: torch.Generator, options: dict[str, Any]) -> Tensor:
        n, c, h, w = self.n, self.classes, self.height, self.width
        if self.target == "soft":
            q = torch.rand(n, c, h, w, generator=generator)
            return q[:, :1] if self.binary else q / q.sum(dim=1, keepdim=True)
        coarse = torch.randint(c, (n, (h + 4) // 5, (w + 6) // 7), generator=generator)
        target = coarse.repeat_interleave(5, 1).repeat_interleave(7, 2)[:, :h, :w].clone()
        if self.target == "constant":
            target[:] = c - 1
        ignored = options["ignore_index"]
        if torch.iinfo(self.labels).min <= ignored <= torch.iinfo(self.labels).max:
            target[torch.rand(n, h, w, generator=generator) < self.void] = ignored
        return target.to(self.labels)

    def make_proxy(self, generator: torch.Generator) -> EdgeProxy:
        ins = [self.classes, *(out for out, _ in self.layers)]
        layers = [ProxyLayer(a, out, k) for a, (out, k) in zip(ins, self.layers, strict=False)]
        weights, biases = [], []
        for number, layer in enumerate(layers):
            size = (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)
            fan_in = layer.kernel_size**2 * (1 if number == 0 else layer.in_channels)
            weights.append(torch.randn(size, generator=generator) * (2 / fan_in) ** 0.5)
            biases.append(0.1 * torch.randn(layer.out_channels, generator=generator))
        scales = {self.distance: [0.5 + 0.3 * number for number in range(len(layers))]}
        return EdgeProxy.from_tensors(layers, weights, biases, tap=self.tap, distance=self.distance, scales=scales)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides; "expanded" repeats the first image (and changes the values so)."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.nn.functional.pad(x, (2, 3, 1, 0))[:, :, 1:, 2:-3]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x[:1].expand_as(x) if layout == "expanded" else x


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    binary = draw(st.sampled_from([False, False, False, True]))
    classes = 2 if binary else draw(st.integers(2, 40))
    count = draw(st.integers(2, 5))
    widths = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17])
    layers = tuple((draw(widths), draw(st.sampled_from([3, 3, 3, 1, 5, 7]))) for _ in range(count))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    if draw(st.integers(0, 19)) == 19:  # wider than any strip of columns
        height, width, classes = 3, 2049 + width, 2
    unit = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "ignore_index": draw(st.sampled_from([-100, -1, 0, 127, 255])),
        "empty": draw(st.sampled_from(["zero", "zero", "nan"])),
        "lambda_ce": draw(unit),
        "lambda_semeda": draw(unit),
        "layer_weights": tuple(draw(unit) for _ in range(count)),
    }
    return Problem(
        n=draw(st.integers(1, 2)),
        classes=classes,
        height=height,
        width=width,
        layers=layers,
        tap=draw(st.sampled_from(["pre", "post"])),
        distance=draw(st.sampled_from(["l1", "l2", "smooth_l1"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from([0.0, 1.0, 3.0, 30.0])),
        target=draw(st.sampled_from(["hard", "hard", "hard", "soft", "constant"])),
        labels=draw(st.sampled_from(LABELS)),
        void=draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])),
        masked=draw(st.sampled_from([0.0, 0.0, 0.2, 1.0])),
        binary=binary,
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        small=draw(st.sampled_from([None, (draw(st.integers(1, height)), draw(st.integers(1, width)))])),
        options=options,
    )


@pytest.mark.timeout(3000 if EXAMPLES else 300)
def test_random_configurations() -> None:
    pixels = {"decided": 0, "all": 0}

    @settings(
        max_examples=EXAMPLES or 150,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(problems())
    def compare(problem: Problem) -> None:
        logits, target, proxy, options = problem.make()
        judge = Judge(logits, target, proxy, **options)
        before = logits.clone()
        ours = loss_and_grad(logits, target, proxy, "cpu", **options)
        assert torch.equal(before, logits), "the logits were written to"
        judge.check(ours)
        pixels["decided"] += int(judge.decided.sum())
        pixels["all"] += judge.decided.numel()

    compare()
    # What a gradient is compared on must not shrink unseen.
    assert pixels["decided"] > 0.5 * pixels["all"], pixels
