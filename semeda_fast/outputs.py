"""What networks return beside one tensor of logits: pyramids, auxiliary heads, dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .functional import LossComponents
from .loss import SemedaLoss

AUXILIARY = ("aux_logits", "auxiliary_logits")


class MultiScaleComponents(NamedTuple):
    """The loss, and the components of each output by its name; only `loss` carries a gradient."""

    loss: Tensor
    outputs: dict[str, LossComponents]


class MultiScaleLoss(nn.Module):
    """One criterion for a network with several outputs: sum_i w_i criterion(logits_i, target).

    Logits of another size than the target's are scaled up inside the loss (`upsample="bilinear"`); volumes whose slices
    lie apart are scaled by torch before. With a list of targets, one an output, nothing is scaled.

    Args:
        criterion: a SemedaLoss, used as it is but for `upsample`.
        weights: w_i, a number >= 0 an output: in the outputs' order, or by name. None: 1 each. An output of weight 0 is
            left out.

    Shape:
        outputs: a tensor of logits; a list, a tuple or a dict of them; or an object with `.logits` and, where there is
        one, `.aux_logits` or `.auxiliary_logits`. Names: the dict's keys, "logits" and "aux_logits", or "0", "1", ...

    Raises:
        ValueError, TypeError: outputs without logits, or weights that do not fit them; and what `criterion` raises.

    Example:
        >>> criterion = MultiScaleLoss(SemedaLoss(num_classes=21, ignore_index=255), {"out": 1.0, "aux": 0.5})
        >>> loss = criterion(deeplabv3(images), target)
    """

    def __init__(self, criterion: SemedaLoss, weights: Sequence[float] | Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not isinstance(criterion, SemedaLoss):
            raise TypeError(f"criterion must be a SemedaLoss, got {type(criterion).__name__}")
        numbers = list(weights.values() if isinstance(weights, Mapping) else weights or ())
        if not all(isinstance(number, (int, float)) and 0 <= number < float("inf") for number in numbers):
            raise ValueError(f"weights must be finite numbers >= 0, got {weights!r}")
        self.criterion = criterion
        self.weights = dict(weights) if isinstance(weights, Mapping) else None if weights is None else tuple(weights)

    def forward(
        self, outputs: Any, target: Tensor | Sequence[Tensor], *, return_components: bool = False, **options: Any
    ) -> Tensor | MultiScaleComponents:
        """The weighted sum of the outputs' losses.

        Args:
            target: of all outputs, as `SemedaLoss.forward` takes it; or one an output, in their order.
            options: of `SemedaLoss.forward`: valid_mask, pixel_weight, counts.
        """
        logits = named_logits(outputs)
        weights = self._weights_of(list(logits))
        if isinstance(target, Tensor):
            targets: list[Tensor] = [target] * len(logits)
        elif len(target) == len(logits):
            targets = list(target)
        else:
            raise ValueError(f"target must be a tensor or hold one an output, {len(logits)}, got {len(target)}")
        loss: Tensor | None = None
        components = {}
        for (name, each), weight, labels in zip(logits.items(), weights, targets, strict=True):
            if weight == 0:
                continue
            of_output = self.criterion.scaled(each, labels, return_components=return_components, **options)
            if isinstance(of_output, LossComponents):
                components[name] = of_output
                of_output = of_output.loss
            term = of_output if weight == 1 else weight * of_output
            loss = term if loss is None else loss + term
        if loss is None:
            raise ValueError("each output has the weight 0; give one of them a weight > 0")
        return MultiScaleComponents(loss, components) if return_components else loss

    def _weights_of(self, names: list[str]) -> list[float]:
        if self.weights is None:
            return [1.0] * len(names)
        if isinstance(self.weights, dict):
            if missing := [name for name in names if name not in self.weights]:
                raise ValueError(f"weights have no {missing[0]!r}; the outputs are {', '.join(map(repr, names))}")
            return [self.weights[name] for name in names]
        if len(self.weights) != len(names):
            raise ValueError(f"{len(self.weights)} weights for {len(names)} outputs, {', '.join(map(repr, names))}")
        return list(self.weights)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def named_logits(outputs: Any) -> dict[str, Tensor]:
    """The logits in what a network returns, by name.

    Raises:
        TypeError: there are none.
    """
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    if isinstance(getattr(outputs, "logits", None), Tensor):
        found = {"logits": outputs.logits}
        for name in AUXILIARY:
            if isinstance(getattr(outputs, name, None), Tensor):
                found[name] = getattr(outputs, name)
        return found
    if isinstance(outputs, Mapping):
        found = {str(name): value for name, value in outputs.items() if isinstance(value, Tensor)}
    elif isinstance(outputs, (list, tuple)):
        found = {str(i): value for i, value in enumerate(outputs) if isinstance(value, Tensor)}
    else:
        found = {}
    if not found:
        raise TypeError(
            f"outputs hold no logits: expected a tensor, a list or a dict of tensors, or an object with .logits, "
            f"got {type(outputs).__name__}"
        )
    return found
