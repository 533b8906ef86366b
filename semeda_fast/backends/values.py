"""What tensors hold: labels that are no class, targets that are no distribution, logits that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ..advice import VOID, advice_on
from ..spec import LossSpec
from ..warn import warn_user
from .distributions import bad_pixels, check_distribution
from .native import has_bad_label
from .reference import validity


def check_labels(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec) -> None:
    """Raise ValueError for integer labels that are neither classes nor ignore_index. Waits for the device."""
    if target.is_floating_point():
        return
    num_classes = 2 if spec.mode == "binary" else logits.shape[1]
    if has_bad_label(target, valid, num_classes, spec.ignore_index) is False:
        return
    _, bad = validity(logits, target, valid, spec)
    if not bool(bad.any()):
        return
    wrong = target.to(torch.int64)[bad]  # uint16 cannot be indexed everywhere
    values, counts = wrong.unique(return_counts=True)
    shown = ", ".join(f"{v} ({c} pixels)" for v, c in list(zip(values.tolist(), counts.tolist(), strict=True))[:5])
    n, y, x = bad.nonzero()[0].tolist()
    seen = target.to(torch.int64)
    seen = seen if valid is None else seen[valid]
    advice = advice_on(seen, num_classes, spec.ignore_index, binary=spec.mode == "binary")
    raise ValueError(
        f"target holds labels outside [0, {num_classes}): from {int(values.min())} to {int(values.max())}, "
        f"{wrong.numel()} of {target.numel()} pixels: {shown}; the first at [n={n}, y={y}, x={x}]; "
        f"ignore_index={spec.ignore_index}. {advice}."
    )


def check_target_values(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec) -> None:
    """Raise ValueError for labels that are no class, or a soft target that is no distribution. Waits for the device."""
    if target.is_floating_point():
        check_distribution("target", target, valid, spec)
    else:
        check_labels(logits, target, valid, spec)


def bad_targets(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec) -> Tensor:
    """[N,H,W] bool: where `check_target_values` would raise."""
    if target.is_floating_point():
        return bad_pixels(target, valid, spec)
    return validity(logits, target, valid, spec)[1]


def warn_of_lost_foreground(logits: Tensor, target: Tensor, valid: Tensor | None, spec: LossSpec) -> None:
    """Warn where nothing but class 0 of two is left beside an ignored 255. Waits for the device.

    A batch without foreground is right in many data sets, so it is no error.
    """
    two = spec.mode == "binary" or logits.shape[1] == 2
    one_plane = target.dim() == 3 or target.shape[1] == 1
    if spec.ignore_index != VOID or not two or not one_plane:
        return
    v, _ = validity(logits, target, valid, spec)
    labels = target.reshape(v.shape)
    if bool((labels == VOID).any()) and not bool((labels[v] != 0).any()):
        warn_user(
            "every valid pixel is of class 0 beside pixels of 255, which are ignored: if 255 is the foreground, as in "
            "binary masks of image files, pass target // 255 and leave ignore_index=255 out"
        )


def assertion(x: Tensor, name: str = "target") -> str:
    """The text of an asynchronous assert, which cannot say what a tensor holds."""
    kind = "labels that are neither in [0, num_classes) nor ignore_index"
    if x.is_floating_point():
        kind = "values that are no distribution over the classes: below 0, above 1, NaN, or of another sum than 1"
    return f"semeda_fast: {name} with {kind}; run once with validate='always' to see which, and what to do"


def check_finite(logits: Tensor, v: Tensor) -> None:
    """Raise ValueError for NaN or infinite logits at valid pixels, v [N,H,W]. Waits for the device."""
    wrong = (logits.isnan() | (logits == torch.inf)) & v.unsqueeze(1)  # -inf is a class that is ruled out
    if bool(wrong.any()):
        n, c, y, x = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"logits hold {int(wrong.sum())} NaN or +inf values at valid pixels, the first at "
            f"[n={n}, c={c}, y={y}, x={x}]; look for a diverged or overflowed step before the loss"
        )
