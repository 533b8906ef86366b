"""What a distribution is: of soft targets, and of probabilities in the place of logits.

A pixel holds one where no value is below 0 and the sum is 1, so that none is above 1, to within rounding. A target of
one channel is the probability of class 1 beside its complement. The fused kernels look while they read
(csrc/cpu/pixels.h, kernels/softmax.py); this is the same for whole tensors, and the error for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..advice import Labels, distribution_advice, label_advice
from ..spec import LossSpec

BELOW_ZERO = 1e-2  # so far a value may lie below 0; in the kernels, too


def tolerance(dtype: torch.dtype) -> float:
    """How far a sum may lie from 1.

    Rounding is no mistake: softmax, label smoothing and mixup in bfloat16 round by 2^-9 each, whatever they are cast to
    later, and a probability map that was stored in 8 bits sums to 1 within a few percent. float8 rounds by 2^-4 and
    small shares to 0. What is none is far off: logits, greys, several classes at one pixel or none.
    """
    return 0.5 if dtype.itemsize == 1 else 5e-2


def limit_for(target: Tensor, check: bool) -> float:
    """The tolerance of a target that is to be looked at; 0 for labels, and where nothing is to be looked at."""
    return tolerance(target.dtype) if check and target.is_floating_point() else 0.0


def bad_pixels(x: Tensor, valid: Tensor | None, spec: LossSpec, limit: float = 0.0) -> Tensor:
    """[N,H,W] bool: valid pixels at which x [N,C,H,W] (in binary mode [N,1,H,W], too) is no distribution.

    Args:
        limit: in the place of the dtype's tolerance, or 0.
    """
    limit = limit or tolerance(x.dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    if one_channel(x, spec):
        one = wide.squeeze(1)
        fine = (one > -BELOW_ZERO) & (1 - one > -BELOW_ZERO)
    else:
        fine = (wide.amin(dim=1) > -BELOW_ZERO) & ((wide.sum(dim=1) - 1).abs() < limit)
    return ~fine if valid is None else valid & ~fine  # a NaN is not fine


def one_channel(x: Tensor, spec: LossSpec) -> bool:
    """Whether x holds the probability of class 1 alone."""
    return spec.mode == "binary" and x.shape[1] == 1


def check_distribution(name: str, x: Tensor, valid: Tensor | None, spec: LossSpec) -> None:
    """Raise ValueError where x is no distribution at a valid pixel. Waits for the device.

    Args:
        name: "target" or "probabilities".
        valid: [N,H,W] bool, or None: all pixels are.
    """
    bad = bad_pixels(x, valid, spec)
    if bool(bad.any()):
        raise_bad_distribution(name, x, valid, bad, spec)


def raise_bad_distribution(name: str, x: Tensor, valid: Tensor | None, bad: Tensor, spec: LossSpec) -> None:
    """The ValueError of `check_distribution`, for the pixels `bad` [N,H,W]."""
    wide = x.detach().to(torch.float64)
    v = torch.ones_like(bad) if valid is None else valid
    at = bad if bool(bad.any()) else v  # a kernel that adds in another order may see what is right at the limit
    n, row, column = at.nonzero()[0].tolist()
    pixel = wide[n, :, row, column]
    one = one_channel(x, spec)
    if one:
        expected, found = "must lie in [0, 1]", f"{float(pixel[0]):.6g}"
    else:
        expected = "must lie in [0, 1] and sum to 1 over the classes"
        found = f"{float(pixel.min()):.4g} to {float(pixel.max()):.4g}, with the sum {float(pixel.sum()):.6g}"
    if name == "target":
        advice = _of_target(wide, v, at, valid is not None, spec)
    else:
        function = "a sigmoid" if one else "a softmax over dim=1"
        advice = f"If these are logits, pass from_logits=True; probabilities are what {function} gives"
    raise ValueError(
        f"{name} {expected} at every valid pixel; {int(at.sum())} of {int(v.sum())} do not, the first at "
        f"[n={n}, y={row}, x={column}]: {found}. {advice}."
    )


def _of_target(wide: Tensor, v: Tensor, bad: Tensor, masked: bool, spec: LossSpec) -> str:
    values = wide.movedim(1, -1)
    seen, wrong = values[v], values[bad]
    if not one_channel(wide, spec):
        return distribution_advice(seen, wrong, False, masked)
    if bool((seen == seen.round()).all()) and bool(seen.isfinite().all()):
        # Labels as floats, where ignore_index is void.
        everywhere = [int(x) for x in values[values.isfinite()].unique().tolist() if x == round(x)]
        found = [int(x) for x in wrong.unique().tolist()]
        return label_advice(Labels(everywhere, found, 2, spec.ignore_index, binary=True))
    return distribution_advice(seen, wrong, True, False)
