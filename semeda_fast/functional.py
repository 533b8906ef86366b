"""semeda_loss: check the options, run the operator, divide by the number of valid pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .backends import Inputs, eager_loss
from .capture import size_of, untraced
from .counts import LossCounts, counts_of
from .folding import Call, binary_weights, folded, is_plain, pixel_weights, unfolded
from .options import LossKeywords, LossOptions, options_of, takes_options
from .plain import class_weights
from .proxy.network import EdgeProxy
from .spec import LossTerms

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from typing_extensions import Unpack

__all__ = ["DEFAULT_LAMBDA_SEMEDA", "LossComponents", "semeda_loss"]

# By distance. With these the gradient of the term at the logits of a trained network is about as strong as that of
# cross-entropy: 1.0 to 1.7 times, measured in docs/evidence.md with the bundled proxy's three layers and layer scales.
DEFAULT_LAMBDA_SEMEDA = {"l1": 0.1, "smooth_l1": 0.05, "l2": 0.03}


class LossComponents(NamedTuple):
    """The loss and what it is made of, on the logits' device; only `loss` carries a gradient.

    Attributes:
        loss: [] or, with reduction="none", [N,H,W]: lambda_ce * ce + lambda_semeda * semeda.
        ce: cross-entropy, reduced like the loss.
        semeda: sum_l w_l D_l, reduced like the loss.
        per_layer: [L], D_l without w_l ("sum": without 1/V; "none": as for "mean").
        valid_count: [] int64, V.
    """

    loss: Tensor
    ce: Tensor
    semeda: Tensor
    per_layer: Tensor
    valid_count: Tensor


@takes_options
def semeda_loss(
    logits: Tensor,
    target: Tensor,
    proxy: EdgeProxy,
    *,
    valid_mask: Tensor | None = None,
    lambda_ce: float | Tensor = 1.0,
    lambda_semeda: float | Tensor | None = None,
    weight: Tensor | ArrayLike | None = None,
    pos_weight: Tensor | ArrayLike | None = None,
    pixel_weight: Tensor | None = None,
    counts: LossCounts | None = None,
    return_components: bool = False,
    **options: Unpack[LossKeywords],
) -> Tensor | LossComponents:
    """Cross-entropy plus SEMEDA; the functional twin of `SemedaLoss`, where every option is described.

    Args:
        logits: [N,C,H,W], or a volume [N,C,D,H,W], float32, bfloat16, float16 or float64 in any layout (C is 1 in
            binary mode); with upsample of any other size, too.
        target: [N,H,W], [N,1,H,W] or of a volume [N,D,H,W], [N,1,D,H,W] integer labels, or a float distribution of the
            logits' shape, in which ignore_index means nothing: pass a valid_mask. In binary mode also floats with one
            channel, in which ignore_index is void. With mode="multilabel" 0 and 1, or floats between, of the logits'
            shape.
        proxy: an EdgeProxy on the logits' device.
        valid_mask, pixel_weight, counts: as in `SemedaLoss.forward`.

    Returns:
        the loss, fp32 (fp64 for fp64 logits): [] or, with reduction="none", [N,H,W];
        with return_components a LossComponents.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the text names both sides.
        BackendUnavailableError: the backend named cannot run here.
    """
    if not isinstance(proxy, EdgeProxy):
        raise TypeError(
            f"semeda_loss expects an EdgeProxy, got {type(proxy).__name__}; "
            "load one with EdgeProxy.load(path) or EdgeProxy.bundled(num_classes)"
        )
    checks.check_are_tensors(logits, target, valid_mask)
    given = options_of(options, proxy.distance, "semeda_loss()")
    if weight is not None and not isinstance(weight, Tensor):
        weight = class_weights(weight, logits.device)
    if weight is not None and weight.dim() != 1 and given.mode != "multilabel":
        checks.check_class_weight(weight, proxy.num_classes)
    if lambda_semeda is None:
        lambda_semeda = default_lambda(given.distance)
    if pos_weight is not None and not isinstance(pos_weight, Tensor):
        pos_weight = class_weights(pos_weight, logits.device, "pos_weight")
    inputs = Inputs(logits, target, valid_mask, weight)
    more = None
    if not (pos_weight is None and pixel_weight is None and counts is None):
        more = pos_weight, pixel_weight, counts
    if more is None and not return_components and not torch.compiler.is_compiling():
        checks.check_lambda("lambda_ce", lambda_ce)
        checks.check_lambda("lambda_semeda", lambda_semeda)
        loss = eager_loss(inputs, proxy, lambda_ce, lambda_semeda, given)
        if loss is not None:
            return loss
    return general_loss(inputs, proxy, lambda_ce, lambda_semeda, given, return_components, more)


More = tuple[Tensor | None, Tensor | None, LossCounts | None]  # pos_weight, pixel_weight, counts


def general_loss(
    inputs: Inputs,
    proxy: EdgeProxy,
    lambda_ce: float | Tensor,
    lambda_semeda: float | Tensor,
    options: LossOptions,
    return_components: bool,
    more: More | None = None,
) -> Tensor | LossComponents:
    """`semeda_loss` for what the short way of `backends.eager_loss` does not serve; checks all but the proxy."""
    logits, target, valid_mask, weight = inputs
    pos_weight, pixel_weight, counts = more or (None, None, None)
    checks.check_are_tensors(logits, target, valid_mask)
    if proxy.lost:
        raise RuntimeError(
            "the proxy's weights are gone: it was on the meta device before to_empty(), and checkpoints do not hold "
            "it; build the SemedaLoss (or the EdgeProxy) again"
        )
    checks.check_lambda("lambda_ce", lambda_ce)
    checks.check_lambda("lambda_semeda", lambda_semeda)
    options.check()
    untraced(checks.check_more, weight, pos_weight, pixel_weight, counts, proxy.num_classes, options)
    reduction, many = options.reduction, options.mode == "multilabel"
    divisors = counts
    if divisors is None and reduction == "mean" and (pixel_weight is not None or (pos_weight is not None and not many)):
        divisors = untraced(counts_of, target, valid_mask, weight, pixel_weight, options)
    call, shape = Call(logits, target, valid_mask, weight, pos_weight, pixel_weight), None
    if many or not is_plain(logits, target, options):
        call, options, shape = folded(call, options)
        short = more is None and call.weight is None and call.logits.dim() == 4
        if short and not return_components and not torch.compiler.is_compiling():
            loss = eager_loss(Inputs(*call[:4]), proxy, lambda_ce, lambda_semeda, options)
            if loss is not None:
                return loss
    call = pixel_weights(call)
    if call.pos_weight is not None:
        call = call._replace(weight=binary_weights(call.weight, call.pos_weight))
    terms = _terms(call, proxy, options)
    ce, semeda = terms.ce, terms.semeda
    if call.pixel_weight is not None:
        shares = call.pixel_weight.to(ce.dtype)
        ce, semeda = ce * shares, semeda * shares
        if reduction != "none":
            ce, semeda = ce.sum(), semeda.sum()
    if reduction == "none":
        ce, semeda = unfolded(ce, shape, many, options), unfolded(semeda, shape, many, options)
    empty = options.empty
    count = terms.valid_count if empty == "nan" else terms.valid_count.clamp(min=1)
    plain = reduction == "mean" and divisors is None and (weight is None or many or call.target.is_floating_point())
    if divisors is not None:
        ce = ce / _divisor(divisors.ce_weight.to(ce.dtype), empty)
        semeda = semeda / _divisor(divisors.valid.to(ce.dtype), empty)
    elif reduction == "mean" and not plain:
        ce, semeda = ce / _divisor(terms.ce_weight, empty), semeda / count
    # In the terms' dtype: a float64 schedule tensor must not turn the loss into float64.
    if isinstance(lambda_semeda, Tensor):
        loss = _scaled(ce, lambda_ce) + _scaled(semeda, lambda_semeda)
    else:
        loss = torch.add(_scaled(ce, lambda_ce), semeda, alpha=lambda_semeda)
    if plain:  # both are means over the valid pixels: one division, since each step costs microseconds
        loss = loss / count
    if return_components:
        if plain:
            ce, semeda = ce.detach() / count, semeda.detach() / count
        per_layer = terms.per_layer if reduction == "sum" else terms.per_layer / count
        return LossComponents(loss, ce.detach(), semeda.detach(), per_layer, terms.valid_count)
    return loss


def _terms(call: Call, proxy: EdgeProxy, options: LossOptions) -> LossTerms:
    """Of images; as maps where they are still to be weighted."""
    logits, target, valid_mask = call.logits, call.target, call.valid
    if options.mode == "binary" and target.dim() == logits.dim() and size_of(target, -3) == 1:
        if not target.is_floating_point():
            target = target.squeeze(-3)  # the shape that BCEWithLogitsLoss takes
        else:
            labelled = target.squeeze(-3) != options.ignore_index  # void as such targets have it, beside probabilities
            if valid_mask is None:
                valid_mask = labelled
            elif untraced(_fits, valid_mask, labelled):  # else the checks object to it
                valid_mask = valid_mask & labelled
    spec = backends.spec_of(proxy, options)
    if call.pixel_weight is not None:
        spec = replace(spec, reduction="none")
    if call.weight is not None and call.weight.dim() == 2:
        spec = replace(spec, weight_rows=size_of(call.weight, 0))
    tensors = logits, target, valid_mask, call.weight, proxy.weights, proxy.biases
    if torch.compiler.is_compiling():  # the operator keeps the checks and the choice of a backend out of its sight
        operator = torch.ops.semeda_fast.loss_terms
        return LossTerms(*operator(*tensors, *spec.arguments(), backends.installation()))
    return backends.loss_terms(*tensors, spec)


def _fits(mask: Tensor, labelled: Tensor) -> bool:
    return mask.shape == labelled.shape and mask.dtype == torch.bool


def default_lambda(distance: str) -> float:
    """The weight of the SEMEDA term where none is given; 0 for an unknown distance, which the checks refuse."""
    return DEFAULT_LAMBDA_SEMEDA.get(distance, 0.0)


def _divisor(count: Tensor, empty: str) -> Tensor:
    """What a mean is divided by: the count, or 1 for an empty one, whose sum is 0 with a zero gradient."""
    return count if empty == "nan" else torch.where(count > 0, count, 1.0)


def _scaled(term: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.to(term.dtype).reshape(()) * term
    return term if factor == 1.0 else factor * term
