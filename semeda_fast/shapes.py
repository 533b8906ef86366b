"""What to do about logits and targets of other shapes than the loss takes: remedies for the messages of `checks`.

Each names the code to write, and `tests/test_advice_shapes.py` runs that code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .advice import BUNDLED_CLASSES
from .spec import LossSpec

COLOURS = "these look like colours: map each colour to a label first"


def logits_rank(logits: Tensor, target: Tensor, spec: LossSpec) -> str:
    """For logits that have not four dimensions."""
    shape = logits.shape
    if len(shape) == 3 and spec.mode == "binary" and target.dim() == 3:
        also = " and target.unsqueeze(1)" if target.is_floating_point() else ""
        return f"add the channel with logits.unsqueeze(1){also}"
    if len(shape) == 3 and shape == target.shape and not target.is_floating_point():
        return "for one channel with a sigmoid use mode='binary' and logits.unsqueeze(1)"
    if len(shape) == 3:
        also = " and target.unsqueeze(0)" if target.dim() == 2 or target.is_floating_point() else ""
        return f"add a batch dimension with logits.unsqueeze(0){also}"
    return "the loss sees neighbours, so it takes whole images"


def logits_channels(logits: Tensor, num_classes: int, spec: LossSpec) -> str:
    """For logits of another number of channels than the proxy has classes, or than binary mode takes."""
    channels, last = logits.shape[1], logits.shape[3]
    if spec.mode == "binary":
        if last == 1:
            return "the channel is the last dimension here: pass logits.permute(0, 3, 1, 2)"
        exclusive = f"for classes that exclude each other use mode='multiclass' with num_classes={channels}"
        return f"{exclusive}, for others mode='multilabel' with a target of that shape"
    if channels == 1:
        return "for one channel with a sigmoid use mode='binary'"
    if last == num_classes:
        return "the classes are the last dimension here: pass logits.permute(0, 3, 1, 2)"
    if channels > BUNDLED_CLASSES:
        return f"build the loss with a proxy for {channels} classes, which train_proxy makes"
    return f"build the loss with num_classes={channels} or a proxy for {channels} classes"


def label_shape(target: Tensor, logits: Tensor, spec: LossSpec) -> str:
    """For integer labels of another shape than [N,H,W], or "" where nothing is known."""
    n, c, h, w = logits.shape
    shape = tuple(target.shape)
    classes = 2 if spec.mode == "binary" else c
    if len(shape) == 4 and 1 in (shape[1], shape[3]):
        return f"drop the channel with target.squeeze({1 if shape[1] == 1 else 3})"
    if len(shape) == 4 and classes in (shape[1], shape[3]):
        dim = 1 if shape[1] == classes else 3
        return f"of a one-hot map pass the labels, target.argmax(dim={dim})"
    if len(shape) == 4 and 3 in (shape[1], shape[3]):
        return COLOURS
    if shape == (n, w, h):
        swapped = "height and width are exchanged: pass target.transpose(1, 2)"
        if w == c:  # and as many rows as classes would hide from the channels that the classes are last
            return f"{swapped}; or the classes are the last dimension of the logits: pass logits.permute(0, 3, 1, 2)"
        return swapped
    if shape == (h, w) and n == 1:
        return "add a batch dimension with target.unsqueeze(0)"
    if len(shape) < 3 and target.numel() == n * h * w:
        return f"pass target.reshape({n}, {h}, {w})"
    if len(shape) == 3 and shape[0] == n and not spec.upsample:
        return "pass upsample='bilinear' to have the logits scaled up to the target's size"
    if len(shape) == 3 and shape[0] != n:
        return f"the batches differ, {n} and {shape[0]} images"
    return ""


def distribution_shape(target: Tensor, logits: Tensor, spec: LossSpec) -> str:
    """For a floating-point target of another shape than a distribution has."""
    n, c, h, w = logits.shape
    shape = tuple(target.shape)
    binary = spec.mode == "binary"
    channels = (1, 2) if binary else (c,)
    if len(shape) == 4 and shape[3] in channels and shape[:3] == (n, h, w):
        return "the classes are the last dimension here: pass target.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1] in channels and (shape[0], *shape[2:]) == (n, w, h):
        return "height and width are exchanged: pass target.transpose(2, 3)"
    if len(shape) == 4 and shape[1] in channels and shape[0] == n and not spec.upsample:
        return "pass upsample='bilinear' to have the logits scaled up to the target's size"
    if binary and shape == (n, h, w):
        return "add the channel with target.unsqueeze(1)"
    if len(shape) == 4 and shape[1] == 1:
        return _float_labels(target, "target.squeeze(1)", spec.ignore_index)
    if len(shape) == 4 and shape[3] == 1:
        return _float_labels(target, "target.squeeze(3)", spec.ignore_index)
    return _float_labels(target, "target", spec.ignore_index) if len(shape) < 4 else f"the network gives {c} channels"


def one_mask(mask: Tensor, ignore_index: int) -> str:
    """For what a Dataset of masks gives in the place of integer labels [H,W]."""
    name, shape = "mask", tuple(mask.shape)
    if len(shape) == 3 and 1 in (shape[0], shape[2]):
        name = f"mask.squeeze({0 if shape[0] == 1 else 2})"
    if mask.is_floating_point():
        return _float_labels(mask, name, ignore_index)
    if len(shape) == 3 and 3 in (shape[0], shape[2]) and name == "mask":
        return COLOURS
    return f"let the Dataset give {name}" if name != "mask" else "each item is one mask"


def many_masks(shape: Sequence[int]) -> str:
    """For a tensor of masks that is not [M,H,W]."""
    if len(shape) == 4 and shape[1] == 1:
        return "pass masks.squeeze(1)"
    return "pass masks.unsqueeze(0) for one mask" if len(shape) == 2 else "pass labels, one integer a pixel"


def _float_labels(target: Tensor, name: str, ignore_index: int) -> str:
    """Labels as floats; what they hold is looked at, since an error is sure."""
    plain = f"pass labels as integers, {name}.long()"
    watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(target) is not Tensor or target.is_meta or watched or torch._C._len_torch_dispatch_stack():
        return plain
    values = target.detach().to(torch.float64)
    known = values[values.isfinite()]
    if bool((known == known.round()).all()):
        if known.numel() == values.numel():
            return plain
        return f"pass labels as integers, torch.nan_to_num({name}, nan={ignore_index}).long()"
    scaled = 255 * known
    rounding = 0.1 if target.dtype.itemsize < 4 else 1e-3
    if bool(((known >= 0) & (known <= 1) & ((scaled - scaled.round()).abs() < rounding)).all()):
        return f"these are labels / 255, as torchvision's ToTensor makes of them: pass ({name} * 255).round().long()"
    return "these are no labels: look for an interpolation, masks are resized to the nearest neighbour"
