"""The terms of the loss by any backend, as a function and as the registered operator that torch.compile traces.

`torch.ops.semeda_fast.loss_terms` is composite: autograd and the compiler see through it to what the chosen
backend runs. For the reference that is plain PyTorch (fused by the compiler, differentiable any number of
times); a fused backend runs operators of its own with their own backward. Whatever needs only metadata is
checked inside, so it costs nothing in a compiled graph and an error is the same from every caller.

The dispatcher takes 40 us to walk a schema of twenty arguments, so eager code calls the function.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..capture import untraced, writes_onnx
from ..spec import ARGUMENTS, LossSpec, LossTerms, schema
from . import reference, values
from . import registry as backends
from .distributions import bad_pixels, check_distribution

_library = torch.library.Library("semeda_fast", "DEF")
_library.define(
    "loss_terms(Tensor logits, Tensor target, Tensor? valid, Tensor? class_weight, Tensor[] weights, "
    f"Tensor[] biases, {schema()}, str made_by='') -> "
    "(Tensor ce, Tensor semeda, Tensor per_layer, Tensor ce_weight, Tensor valid_count)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _loss_terms(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *values: Any,
) -> LossTerms:
    """The operator: `loss_terms` of the arguments of LossSpec, each for itself, so that a compiler sees constants.

    `made_by`, the last, changes nothing but the key under which the compiler keeps its graphs on disk; see
    `installation`.
    """
    settings: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    spec = LossSpec(**dict(zip(ARGUMENTS, settings, strict=False)))
    return loss_terms(logits, target, valid, class_weight, weights, biases, spec)


def loss_terms(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: LossSpec,
) -> LossTerms:
    """What `LossTerms` says, by the backend that `backends.choose` takes."""
    backend, validate = spec.backend, spec.validate
    if writes_onnx():
        backend, validate = _for_onnx(backend, validate, spec.distance)
    groups = logits.dim() == 5
    group = [x[:, 0] if groups and x is not None else x for x in (logits, target, valid)]  # has the metadata of all
    chosen, scaled_by_torch = untraced(_choose, backend, *group, class_weight, weights, spec)
    if groups and (scaled_by_torch or not chosen.folds or validate == "always"):
        logits, target = logits.flatten(0, 1), target.flatten(0, 1)
        valid = None if valid is None else valid.flatten(0, 1)
    if chosen.upsamples is None:
        spec = replace(spec, upsample=None)
    assert chosen.run is not None, f"backend {chosen.name} is available but has nothing to run"
    device = logits.device.type  # the meta device, for one, has no autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if scaled_by_torch:
            # Rounded to half precision they would miss the error budget of a backend that multiplies in fp32.
            exact = logits if chosen.half_products or logits.dtype == torch.float64 else logits.to(torch.float32)
            logits = reference.upsampled(exact, target.shape[-2:])
        if chosen.checks_labels:
            terms = chosen.run(logits, target, valid, class_weight, weights, biases, spec, validate == "auto")
        else:
            terms = chosen.run(logits, target, valid, class_weight, weights, biases, spec)
        if validate == "never" or (validate == "auto" and chosen.checks_labels):
            return terms
        # The guard is 0; added, it keeps the compiler from dropping the check as unused.
        guard = torch.ops.semeda_fast.check_values(
            logits.detach(), target, valid, spec.ignore_index, spec.mode, spec.from_logits, validate == "always"
        )
        return terms._replace(ce=terms.ce + guard)


_library.impl("loss_terms", _loss_terms, "CompositeImplicitAutograd")
# Before a transform of torch.func takes the call apart: inside, only what is an operator itself could be transformed.
_library.impl("loss_terms", _loss_terms, "FuncTorchDynamicLayerFrontMode")


def installation() -> str:
    """What decides what is made of the operator `loss_terms`, beside its arguments: our code, and who can run here.

    Else torch.compile would take a graph from its cache on disk that another version has made, or another backend.
    """
    devices = ("cpu", "cuda", "xpu")
    return f"{_sources()} {[backends.available_names(device) for device in devices]}"


installation._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's, whose import takes seconds


@functools.cache
def _sources() -> str:
    """A digest of this package's Python files."""
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _choose(
    name: str,
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    spec: LossSpec,
) -> tuple[backends.Backend, bool]:
    """The backend that runs, and whether torch scales the logits up before; looks at metadata only, and checks it."""
    checks.check_tensors(logits, target, valid, class_weight, weights, spec)
    chosen = backends.choose(name, logits, target, weights, spec)
    if not spec.upsample or logits.shape[2:] == target.shape[-2:]:
        return chosen, False
    return chosen, chosen.upsamples is None or not chosen.upsamples(logits, target)


def _for_onnx(backend: str, validate: str, distance: str) -> tuple[str, str]:
    """The backend and the validation of a call that becomes an ONNX graph, which holds torch's own operators alone.

    Raises:
        ValueError: another was asked for by name, or a distance that the older exporter does not know.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(
            f"torch.onnx.export cannot translate the operators of backend {backend!r}; set criterion.backend = 'auto' "
            "for the export, which takes the reference there"
        )
    if validate == "always":
        raise ValueError(
            "an ONNX graph cannot raise an error for what tensors hold, as validate='always' asks; set "
            "criterion.validate = 'auto' for the export: a label that is no class then makes the result NaN"
        )
    if distance == "smooth_l1" and torch.jit.is_tracing():
        raise ValueError(
            "torch.onnx.export(dynamo=False) cannot translate smooth_l1_loss of torch, which distance='smooth_l1' "
            "takes; export with dynamo=True"
        )
    return "reference", "never"


def _check_values(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    ignore_index: int,
    mode: str,
    from_logits: bool,
    always: bool,
) -> Tensor:
    """0, after `look_at_values`."""
    spec = LossSpec((), (), ignore_index=ignore_index, mode=mode, from_logits=from_logits)
    look_at_values(logits, target, valid, spec, always)
    return logits.new_zeros((), dtype=torch.float32)


def look_at_values(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec, always: bool) -> None:
    """Object to what tensors hold: `always` waits for the device and looks at logits, too.

    Otherwise the target alone is looked at, and probabilities in the place of logits: on the CPU at once, elsewhere by
    an asynchronous assert.

    Raises:
        ValueError: naming what was found, where, and what to do.
    """
    at_once = always or logits.device.type == "cpu"
    if at_once:
        values.check_target_values(logits, target, valid, spec)
    else:
        torch._assert_async(~values.bad_targets(logits, target, valid, spec).any(), values.assertion(target))
    if spec.from_logits and not always:
        return
    if always:
        values.warn_of_lost_foreground(logits, target, valid, spec)
    if logits.shape[2:] != target.shape[-2:]:
        logits = reference.upsampled(logits, target.shape[-2:])
    v, _ = reference.validity(logits, target, valid, spec)
    if spec.from_logits:
        values.check_finite(logits, v)
    elif at_once:
        check_distribution("probabilities", logits, v, spec)
    else:
        torch._assert_async(~bad_pixels(logits, v, spec).any(), values.assertion(logits, "probabilities"))


def _fake_check_values(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


_library.define(
    "check_values(Tensor logits, Tensor target, Tensor? valid, int ignore_index, str mode, bool from_logits, "
    "bool always) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("check_values", _check_values, "CompositeExplicitAutograd")
# No gradient goes through it. Decompositions take the `detach` in front of it away, and torch.func would not know how.
_library.impl("check_values", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("semeda_fast::check_values", _fake_check_values, lib=_library)
