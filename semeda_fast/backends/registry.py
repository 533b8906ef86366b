"""Which implementations of the loss exist, which can run here and why not, and how "auto" chooses.

A backend joins by `register(Backend(...))`; the tests then run every guarantee on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..spec import LossSpec, LossTerms
from ..warn import warn_user
from . import cpu, cuda, reference, triton
from .fused import why_not_fused

# (logits, target, valid, class_weight, weights, biases, spec) -> terms, differentiable in the logits; a backend
# with checks_labels takes one argument more, whether to check them
RunFunction = Callable[..., LossTerms]


def _never() -> str | None:
    return None


def _anything(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    return None


def _works(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        devices: device types it runs on, best first; empty means any.
        why_unavailable: None where it can run on this machine, else the cause and the remedy.
        why_unsupported: (logits, target, weights, spec) -> None, or why it cannot do this very computation.
            Looks at metadata only.
        why_failing: (logits, weights, spec) -> None, or why it does not work here although it should: what a trial on
            a tiny image found, once for a device and a proxy. Looks at metadata only.
        fused: whether the limits of the fused kernels (`why_not_fused`) apply to it.
        checks_labels: whether it looks for bad labels itself while it reads them.
        by_name_on: device types on which it runs only where it is named: an interpreter is for tests.
        upsamples: (logits, target) -> whether it takes these logits smaller than the target and scales them up itself
            (None: none of any size); else torch does it before.
        prepare: makes one function of the loss and its reduction, for eager calls of a kind (prepared.py), or is None.
        folds: whether it takes images in groups, logits [A,B,C,H,W]; else they are copied into one batch before.
        half_products: whether it multiplies half-precision logits in half precision (sums are fp32 everywhere).
        opt_in: whether an install has it on request alone, so that it is nothing to warn of where it is missing.
        why_slow: None, or why it is slower here than it could be, and what to do.
    """

    name: str
    run: RunFunction | None
    devices: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = _never
    why_unsupported: Callable[[Tensor, Tensor, Sequence[Tensor], LossSpec], str | None] = _anything
    why_failing: Callable[[Tensor, Sequence[Tensor], LossSpec], str | None] = _works
    fused: bool = False
    checks_labels: bool = False
    by_name_on: tuple[str, ...] = ()
    upsamples: Callable[[Tensor, Tensor], bool] | None = None
    prepare: Callable[..., Any] | None = None
    folds: bool = False
    half_products: bool = False
    opt_in: bool = False
    why_slow: Callable[[], str | None] = _never

    def refusal(self, logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
        """Why this backend leaves these arguments to others, or None; a trial is not part of it."""
        if self.devices and logits.device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the logits are on {logits.device.type}"
        if self.fused and (reason := why_not_fused(weights, spec.strides, spec.dilations, spec.pools)):
            return reason
        return self.why_unsupported(logits, target, weights, spec)


@dataclass(frozen=True)
class BackendStatus:
    """What `backend_info` says about one backend.

    Attributes:
        available: whether it can run here.
        devices: device types that it runs on; empty means any.
        reason: why it cannot run here, and what to do; empty where it can.
        slow: why it is slower here than it could be, and what to do; empty where nothing is known.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str
    slow: str = ""


@dataclass(frozen=True)
class BackendInfo:
    """The backends of this installation; print it for a table.

    Attributes:
        backends: one status a backend.
        auto: device type -> the backend that "auto" takes there for a proxy that the fused kernels can run.
        fallbacks: why "auto" fell back to the reference so far in this process; each was a warning, once.
        failures: why "auto" left a backend for another fused one so far: it failed on a tiny image.
    """

    backends: tuple[BackendStatus, ...]
    auto: dict[str, str]
    fallbacks: tuple[str, ...]
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("backend", "available", "devices", "note")]
        for status in self.backends:
            devices = ", ".join(status.devices) or "any"
            rows.append((status.name, "yes" if status.available else "no", devices, status.reason or status.slow))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]).rstrip() for row in rows]
        lines.append("auto: " + ", ".join(f"{device} -> {name}" for device, name in self.auto.items()))
        shown = {status.reason: f"{status.name} is not available" for status in self.backends}
        lines.extend(f"fell back to reference: {shown.get(reason, reason)}" for reason in self.fallbacks)
        lines.extend(f"fell back to another fused backend: {reason}" for reason in self.failures)
        return "\n".join(lines)


_registry: dict[str, Backend] = {}
_changes = 0  # of the registry
_fallbacks: dict[str, None] = {}  # a set that keeps its order
_failures: dict[str, None] = {}
_slow: dict[str, None] = {}


def register(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name. "auto" prefers those registered last."""
    if backend.name == "auto":
        raise ValueError("'auto' is no backend but the choice between them; register another name")
    global _changes
    _registry.pop(backend.name, None)
    _registry[backend.name] = backend
    _changes += 1


def unregister(name: str) -> None:
    """Take a backend out of the registry."""
    global _changes
    del _registry[name]
    _changes += 1


def changes() -> int:
    """How often the registry has changed: a choice holds as long as this does."""
    return _changes


def names() -> tuple[str, ...]:
    """All registered names, available here or not."""
    return tuple(_registry)


def available_names(device_type: str = "cpu") -> tuple[str, ...]:
    """The backends that can run on this machine for tensors of that device type."""
    return tuple(
        b.name
        for b in _registry.values()
        if b.why_unavailable() is None and (not b.devices or device_type in b.devices)
    )


def get(name: str) -> Backend:
    """The backend of a registered name; KeyError for another."""
    return _registry[name]


def check_name(name: str) -> None:
    """ValueError for a name nobody registered, BackendUnavailableError for one that cannot run here."""
    if name == "auto":
        return
    if name not in _registry:
        known = ", ".join(map(repr, ("auto", *_registry)))
        raise ValueError(f"backend must be one of {known}, got {name!r}")
    reason = _registry[name].why_unavailable()
    if reason is not None:
        instead = "" if "use backend=" in reason else "; use backend='auto' or 'reference' meanwhile"
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}{instead}")


def choose(name: str, logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> Backend:
    """The backend to run; looks at metadata only.

    A backend asked for by name runs or raises. "auto" takes the first fused one that can: silently where others leave
    the computation to it, with one warning where another should work and fails its trial. Where only the reference is
    left it says once, in a warning, why the fused ones could not, or why they are missing; `backend_info()` keeps the
    reasons.

    Raises:
        ValueError: unknown name, or the named backend cannot do this computation, or fails on this device.
        BackendUnavailableError: the named backend cannot run on this machine.
    """
    check_name(name)
    if name != "auto":
        backend = _registry[name]
        if reason := backend.refusal(logits, target, weights, spec):
            raise ValueError(f"backend {name!r} cannot do this: {reason}; use backend='auto' or 'reference'")
        if reason := backend.why_failing(logits, weights, spec):
            raise ValueError(f"backend {name!r} does not work here: {reason}; use backend='auto' or 'reference'")
        return _noted(backend)
    device = logits.device.type
    refusals, missing, failures = [], [], []
    serving = False
    for backend in reversed(_registry.values()):
        if not backend.fused or device in backend.by_name_on or (backend.devices and device not in backend.devices):
            continue
        serving = True
        absent = backend.why_unavailable()
        if absent is not None and (backend.opt_in or not _is_here(device)):
            continue
        if reason := backend.refusal(logits, target, weights, spec):
            refusals.append(reason)
        elif absent is not None:
            missing.append(absent)
        elif reason := backend.why_failing(logits, weights, spec):
            failures.append(reason)
        else:
            _warn_once(_failures, failures, f"SemedaLoss runs on the backend {backend.name!r}")
            return _noted(backend)
    # What no fused backend will ever take is said even where none is installed.
    general = why_not_fused(weights, spec.strides, spec.dilations, spec.pools)
    if not serving and _is_here(device):
        missing.append(f"there are no fused kernels for tensors on {device!r}")
    reasons = [*([general] if general else []), *refusals, *missing, *failures]
    _warn_once(_fallbacks, reasons, "SemedaLoss runs on the slower reference backend")
    return _registry["reference"]


def _is_here(device_type: str) -> bool:
    """Whether this machine has such a device: a compiler traces tensors of others, and of none."""
    if device_type == "cpu":
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device_type


def _noted(backend: Backend) -> Backend:
    """The backend, with one warning where it is slower than it could be."""
    if reason := backend.why_slow():
        _warn_once(_slow, [reason], f"SemedaLoss's backend {backend.name!r} is slower here than it could be")
    return backend


def _warn_once(said: dict[str, None], reasons: Sequence[str], what: str) -> None:
    for reason in reasons:
        if reason not in said:
            said[reason] = None
            warn_user(f"{what}: {reason}")


def backend_info() -> BackendInfo:
    """The backends, whether each can run here, why not, and what "auto" takes on each device type."""
    statuses = []
    for backend in _registry.values():
        reason = backend.why_unavailable()
        slow = backend.why_slow() if reason is None else None
        statuses.append(BackendStatus(backend.name, reason is None, backend.devices, reason or "", slow or ""))
    auto = {}
    for device in ("cpu", "cuda"):
        names_here = available_names(device)
        fused = [b.name for b in _registry.values() if b.fused and device not in b.by_name_on and b.name in names_here]
        auto[device] = fused[-1] if fused else "reference"
    return BackendInfo(tuple(statuses), auto, tuple(_fallbacks), tuple(_failures))


register(Backend("reference", reference.loss_terms, upsamples=lambda logits, target: True))
register(
    Backend(
        "cpu",
        cpu.run,
        ("cpu",),
        cpu.why_unavailable,
        cpu.why_unsupported,
        fused=True,
        checks_labels=True,
        upsamples=cpu.upsamples,
        folds=True,
        prepare=cpu.prepare,
        why_slow=cpu.why_slow,
    )
)
# Before "triton", so that "auto" takes that where both can, until the table "cuda against triton" of `make gpu`
# (benchmarks/gpu/tiles.py) says that "cuda" is faster.
register(
    Backend(
        "cuda",
        cuda.run,
        ("cpu",) if cuda.emulated() else ("cuda",),  # an emulation reads no memory of a GPU
        cuda.why_unavailable,
        cuda.why_unsupported,
        cuda.why_failing,
        fused=True,
        checks_labels=True,
        by_name_on=("cpu",),
        half_products=True,
        opt_in=True,
    )
)
register(
    Backend(
        "triton",
        triton.run,
        ("cuda", "xpu", "cpu") if triton.interpreted() else ("cuda", "xpu"),
        triton.why_unavailable,
        triton.why_unsupported,
        triton.why_failing,
        fused=True,
        checks_labels=True,
        by_name_on=("cpu",),
        half_products=True,
    )
)
