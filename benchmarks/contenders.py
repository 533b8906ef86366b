"""Who runs: plain PyTorch in its usual forms, and every backend of the registry that can run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from semeda_fast import SemedaLoss
from semeda_fast.backends import registry as backends

from .plain import LossFunction, cross_entropy, plain_semeda, under_autocast
from .workloads import LAMBDA_CE, LAMBDA_SEMEDA, Inputs

NOT_INDUCTOR = "aot_eager"  # traces as the compiler does, but writes no C++: for runs that only try the suite out


@dataclass(frozen=True)
class Contender:
    """One way to compute a workload.

    Attributes:
        name: in tables of results, such as "reference_cl".
        title: in reports.
        layout: memory order of the logits: "nchw" or "channels_last".
        family: contenders of one family differ in layout or compiler mode only; ratios take its fastest.
        compiled: whether torch.compile is at work.
        checked_as: "loss" (the reference's tolerance), "half" (bf16's for fp16 logits, too),
            "autocast" (a wider one), "ce" (cross-entropy's value); `worker.judged_as` knows more.
        fused: whether it is a backend of this library other than the reference.
        upsamples: whether it takes a network's logits at a fraction of the labels' size; in training steps alone.
        make: (inputs, compiler backend) -> the function to call.
    """

    name: str
    title: str
    layout: str
    family: str
    compiled: bool
    checked_as: str
    fused: bool
    make: Callable[[Inputs, str], LossFunction]
    upsamples: bool = False


def contenders(device: str = "cpu") -> dict[str, Contender]:
    """Everything that can run on this machine for tensors of that device type, baselines first."""
    found = [
        _ce("ce", "cross-entropy alone, eager", None),
        _ce("ce_compiled", "cross-entropy alone, torch.compile", "default"),
        *_both_layouts(_reference, "reference", "reference, eager", None),
        *_both_layouts(_autocast, "autocast", "plain PyTorch, eager, bf16 autocast", None),
        *_both_layouts(_reference, "compiled", "reference, torch.compile", "default"),
        *_both_layouts(_reference, "compiled_max", "reference, torch.compile max-autotune", "max-autotune"),
        *_both_layouts(_autocast, "compiled_autocast", "plain PyTorch, torch.compile, bf16 autocast", "default"),
    ]
    for name in fused_names(device):
        found += _both_layouts(_backend, name, f"semeda_fast {name}", name)
    return {contender.name: contender for contender in found}


def upsampling(device: str = "cpu") -> dict[str, Contender]:
    """Those that take a network's logits as it gives them, and scale them up themselves."""
    able = [_upsampling(name) for name in fused_names(device) if backends.get(name).upsamples is not None]
    return {contender.name: contender for contender in able}


def fused_names(device: str = "cpu") -> tuple[str, ...]:
    """The registry's backends that can run here, without the reference and without interpreters."""
    names = backends.available_names(device)
    return tuple(name for name in names if name != "reference" and device not in backends.get(name).by_name_on)


def why_no_subject(device: str = "cpu") -> str:
    """Why nothing is there to measure on that device type, and what to do; "" where a fused backend can run."""
    if fused_names(device):
        return ""
    missing = [backends.get(name) for name in backends.names() if name != "reference"]
    wanted = [b for b in missing if device in b.devices and device not in b.by_name_on] or missing
    reasons = "; ".join(f"{b.name}: {b.why_unavailable()}" for b in wanted)
    return f"no backend but the reference can run on {device!r} here, so there is nothing to measure. {reasons}"


def criterion(inputs: Inputs, backend: str, *, validate: str = "auto", upsample: str | None = None) -> SemedaLoss:
    """The loss of a workload on one backend, on the inputs' device."""
    loss = SemedaLoss(
        inputs.proxy,
        lambda_ce=LAMBDA_CE,
        lambda_semeda=LAMBDA_SEMEDA,
        ignore_index=inputs.workload.ignore_index,
        mode=inputs.workload.mode,
        upsample=upsample,
        backend=backend,
        validate=validate,
    )
    return loss.to(inputs.logits.device)


def _both_layouts(maker: Callable[[str, str, str, Any], Contender], name: str, title: str, how: Any) -> list[Contender]:
    return [maker(name, title, "nchw", how), maker(f"{name}_cl", f"{title}, channels_last", "channels_last", how)]


def _compiled(function: LossFunction, mode: str | None, compiler: str) -> LossFunction:
    if mode is None:
        return function
    if compiler == NOT_INDUCTOR:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _ce(name: str, title: str, mode: str | None) -> Contender:
    def make(inputs: Inputs, compiler: str) -> LossFunction:
        return _compiled(cross_entropy(inputs.workload.ignore_index, inputs.workload.mode), mode, compiler)

    return Contender(name, title, "nchw", name, mode is not None, "ce", False, make)


def _reference(name: str, title: str, layout: str, mode: str | None) -> Contender:
    def make(inputs: Inputs, compiler: str) -> LossFunction:
        # Without the check of label values, which plain PyTorch would not make; the fused backends keep it.
        return _compiled(criterion(inputs, "reference", validate="never"), mode, compiler)

    family = "reference" if mode is None else "compiled"
    return Contender(name, title, layout, family, mode is not None, "loss", False, make)


def _autocast(name: str, title: str, layout: str, mode: str | None) -> Contender:
    def make(inputs: Inputs, compiler: str) -> LossFunction:
        plain = plain_semeda(inputs.proxy, inputs.workload.ignore_index, inputs.workload.mode)
        return _compiled(under_autocast(plain, inputs.logits.device.type), mode, compiler)

    family = "autocast" if mode is None else "compiled_autocast"
    return Contender(name, title, layout, family, mode is not None, "autocast", False, make)


def _backend(name: str, title: str, layout: str, backend: str) -> Contender:
    def make(inputs: Inputs, compiler: str) -> LossFunction:
        return criterion(inputs, backend)

    checked_as = "half" if backends.get(backend).half_products else "loss"
    return Contender(name, title, layout, backend, False, checked_as, True, make)


def _upsampling(backend: str) -> Contender:
    def make(inputs: Inputs, compiler: str) -> LossFunction:
        return criterion(inputs, backend, upsample="bilinear")

    name, title = f"{backend}_upsample", f'semeda_fast {backend}, upsample="bilinear"'
    return Contender(name, title, "nchw", name, False, "loss", True, make, upsamples=True)
