"""What torch.utils.flop_counter counts for the operators of the fused backends: as many as for the reference.

That is two convolutions a layer in forward and one in backward; the kernels themselves leave most of the target's out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .config import parse_config


def announce(forward: Any, backward: Any) -> None:
    """Give formulas for both operators of a backend to the FlopCounterModes at work, if there are any.

    Never imports the counter, which imports Triton.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    if forward not in module.flop_registry:
        module.register_flop_formula(forward)(_forward_flops)
        module.register_flop_formula(backward)(_backward_flops)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):  # which has copied the registry at its beginning
            for operator in (forward, backward):
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])


def _forward_flops(
    logits: Sequence[int], target: Sequence[int], valid: Any, weight: Any, flat: Any, config: str, save: bool, **_: Any
) -> int:
    return 2 * _convolutions(logits, target, config)


def _backward_flops(d_ce: Any, d_semeda: Any, logits: Any, target: Sequence[int], *others: Any, **_: Any) -> int:
    return _convolutions(logits, target, others[-1])


def _convolutions(logits: Sequence[int], target: Sequence[int], config: str) -> int:
    """Of all layers once, for a target of this shape: a multiplication and an addition count as two."""
    settings = parse_config(config)
    channels = settings.channels
    pairs = zip(channels, channels[1:], settings.sizes, strict=False)
    pixels = math.prod(logits[:-3]) * target[-2] * target[-1]
    return 2 * pixels * sum(before * out * size * size for before, out, size in pairs)
