"""The workloads of `tiles.py`: what the CUDA kernels are compared on, from the most important on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from semeda_fast import EdgeProxy
from semeda_fast.spec import LossSpec

from ..workloads import Inputs, Workload, make_inputs, make_proxy, named
from . import bench as gpu_bench


@dataclass(frozen=True)
class Case:
    """A workload, and a proxy that workloads.py does not name: (hidden widths, channels of the last layer)."""

    workload: Workload
    layers: tuple[tuple[int, ...], int] | None = None

    @property
    def name(self) -> str:
        """Unique, such as "voc default bfloat16"."""
        proxy = self.workload.proxy
        if self.layers is not None:
            proxy = "-".join(map(str, (*self.layers[0], self.layers[1])))
        return f"{self.workload.dataset} {proxy} {self.workload.dtype}"

    def inputs(self, device: str) -> Inputs:
        """Its tensors; the numbers are drawn once for all dtypes and proxies of a dataset."""
        drawn = _drawn(self.workload.replace(dtype="float32", proxy="default"), device)
        proxy = make_proxy(self.workload)
        if self.layers is not None:
            proxy = EdgeProxy(self.workload.num_classes, self.layers[0], edge_classes=self.layers[1], seed=0)
        logits = drawn.logits.to(self.workload.torch_dtype)
        return Inputs(self.workload, logits, drawn.target, proxy.to(torch.device(device)), drawn.facts)


@functools.lru_cache(maxsize=3)
def _drawn(workload: Workload, device: str) -> Inputs:
    return make_inputs(workload, device)


def all_cases(labels: str) -> list[Case]:
    """The most important first; sizes as in bench.py."""
    voc = named("voc", dtype="bfloat16", labels=labels, **gpu_bench.VOC)
    cityscapes = named("cityscapes", dtype="bfloat16", labels=labels, batch=4, height=1024, width=1024)
    ade20k = named("ade20k", dtype="bfloat16", labels=labels, batch=8, height=512, width=512)
    return [
        *map(Case, (voc, cityscapes, ade20k, voc.replace(dtype="float32"))),
        *map(Case, (voc.replace(proxy="wide"), voc.replace(proxy="deep"))),
        Case(voc, ((16, 32, 32), 2)),
        *map(Case, (cityscapes.replace(dtype="float32"), ade20k.replace(dtype="float32"))),
    ]


def spec_of(inputs: Inputs) -> LossSpec:
    """The loss of a workload as the operators receive it."""
    proxy = inputs.proxy
    return LossSpec(
        layer_weights=proxy.layer_weights,
        layer_scales=proxy.layer_scales("l1"),
        strides=tuple(layer.stride for layer in proxy.layers),
        dilations=tuple(layer.dilation for layer in proxy.layers),
        pools=tuple(layer.pool for layer in proxy.layers),
        tap=proxy.tap,
        ignore_index=inputs.workload.ignore_index,
        mode=inputs.workload.mode,
    )
