"""When the SEMEDA term counts: a ramp for `criterion.lambda_semeda`."""

from __future__ import annotations

import math

__all__ = ["ramp"]


def ramp(position: float, start: float, length: float, power: float = 1.0) -> float:
    """A factor that is 0 up to `start`, rises over `length`, and is 1 from there on.

    That is clamp((position - start) / length, 0, 1)^power.

    SEMEDA hardly pulls at classes that a network does not find yet (docs/results.md), so let cross-entropy go ahead; a
    ramp keeps the loss from jumping.

    Args:
        position: how far the training is, such as the step.
        start, length: in the same unit; a length of 0 is a jump behind `start`.
        power: of the rise; 1 is a straight line.

    Raises:
        ValueError: a number that is not finite, a negative length, or a power that is not above 0.

    Example:
        >>> criterion.lambda_semeda = torch.tensor(0.0, device=device)  # a tensor: torch.compile compiles once
        >>> for step, (images, target) in enumerate(loader):
        >>>     criterion.lambda_semeda.fill_(0.03 * ramp(step, start=0.1 * steps, length=0.1 * steps))
    """
    if not all(math.isfinite(value) for value in (position, start, length, power)):
        raise ValueError(f"ramp expects finite numbers, got {(position, start, length, power)}")
    if length < 0 or power <= 0:
        raise ValueError(f"ramp expects length >= 0 and power > 0, got length {length} and power {power}")
    if position <= start:
        return 0.0
    return float(min(1.0, (position - start) / length) ** power) if length else 1.0
