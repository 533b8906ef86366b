"""More shapes of the same loss: volumes, overlapping classes and labels with a channel, as batches of images.

Each is a batch of images to the backends: slices of a volume, planes of overlapping classes. Folding changes strides;
it copies logits only where no strides say it (docs/how/shapes.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .capture import shape_of, size_of, untraced
from .options import LossOptions


class Call(NamedTuple):
    """The tensors of a call; beside the logits and target each may be None.

    Attributes:
        weight: [C], or [P,K]: image i of a batch of folded planes has row i % P.
        pixel_weight: of the target's pixels.
    """

    logits: Tensor
    target: Tensor
    valid: Tensor | None
    weight: Tensor | None
    pos_weight: Tensor | None
    pixel_weight: Tensor | None


def is_plain(logits: Tensor, target: Tensor, options: LossOptions) -> bool:
    """Whether the backends take such tensors as they are."""
    labels_with_channel = target.dim() == 4 and not target.is_floating_point()
    return options.mode != "multilabel" and logits.dim() == 4 and not labels_with_channel


def folded(call: Call, options: LossOptions) -> tuple[Call, LossOptions, tuple[int, ...] | None]:
    """The call as a batch of images, its options, and the shape of a map of it before it was folded.

    Raises:
        ValueError: shapes that do not fit together; the text names both.
    """
    if options.mode == "multilabel":
        return _planes(call, options)
    if call.logits.dim() == 5:
        return _slices(call, options)
    target = call.target
    if target.dim() == 4 and not target.is_floating_point() and size_of(target, 1) == 1:
        call = call._replace(target=target.squeeze(1))
    return call, options, None


def pixel_weights(call: Call) -> Call:
    """The call of images, with pixel weights in the shape of the maps, [N,H,W]."""
    if call.pixel_weight is None:
        return call
    target = call.target
    images = shape_of(call.logits)[0] if call.logits.dim() == 4 else shape_of(call.logits)[0] * shape_of(call.logits)[1]
    return call._replace(
        pixel_weight=of_pixels("pixel_weight", call.pixel_weight, (images, shape_of(target)[-2], shape_of(target)[-1]))
    )


def _slices(call: Call, options: LossOptions) -> tuple[Call, LossOptions, tuple[int, ...]]:
    """A volume [N,C,D,H,W]: its slices along slice_dim are images."""
    logits, target = call.logits, call.target
    n, c, *volume = shape_of(logits)
    dim = options.slice_dim
    channels = (1, 2) if options.mode == "binary" else (c,)
    soft = target.is_floating_point()
    if soft and target.dim() == 5 and shape_of(target)[1] in channels:
        sizes = (shape_of(target)[0], *shape_of(target)[2:])
    else:
        if target.dim() == 5 and shape_of(target)[1] == 1 and not soft:
            target = target.squeeze(1)
        sizes = shape_of(target) if not soft else ()
    _check_volume(call, options, sizes, (n, *volume))
    shape = tuple(sizes)
    over = dim - 1  # of what has no channels

    def pixels(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else of_pixels(name, tensor, shape).movedim(over, 1)

    logits, target, valid = _joined(
        1, logits.movedim(dim, 1), target.movedim(dim if soft else over, 1), pixels("valid_mask", call.valid)
    )
    weights = pixels("pixel_weight", call.pixel_weight)
    weights = None if weights is None else weights.flatten(0, 1)
    return call._replace(logits=logits, target=target, valid=valid, pixel_weight=weights), options, shape


def _check_volume(call: Call, options: LossOptions, sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Labels of a volume fit; with upsample the slices may be smaller than those of the labels."""
    fits = len(sizes) == 4
    if fits:
        along = options.slice_dim - 1
        same = (0, along) if options.upsample else (0, 1, 2, 3)
        fits = all(sizes[i] == expected[i] for i in same)
    if not fits:
        n, d, h, w = expected
        c = shape_of(call.logits)[1]
        kind = f"[{n},{c},{d},{h},{w}]" if call.target.is_floating_point() else f"[{n},{d},{h},{w}]"
        remedy = ""
        if options.upsample:
            remedy = f"; upsample scales slices alone, so the sizes along slice_dim={options.slice_dim} must be equal"
        elif len(sizes) == 4 and sizes[0] == n:
            remedy = "; scale the logits with torch.nn.functional.interpolate(logits, size=target.shape[-3:])"
        raise ValueError(
            f"the target of a volume of shape {list(shape_of(call.logits))} must have the shape {kind}, "
            f"got {list(shape_of(call.target))}, {call.target.dtype}{remedy}"
        )


def _planes(call: Call, options: LossOptions) -> tuple[Call, LossOptions, tuple[int, ...]]:
    """Overlapping classes [N,C,H,W] or [N,C,D,H,W]: each plane is a binary image."""
    logits, target = call.logits, call.target
    if logits.dim() not in (4, 5):
        raise ValueError(
            f"with mode='multilabel' logits must have the shape [N,C,H,W] or [N,C,D,H,W], got {list(shape_of(logits))}"
        )
    small = options.upsample is not None
    leading = 2 + (1 if small and logits.dim() == 5 else 0)
    n, c = shape_of(logits)[:2]
    fits = target.dim() == logits.dim() and shape_of(target)[:2] == shape_of(logits)[:2]
    if fits and not small:
        fits = shape_of(target) == shape_of(logits)
    elif fits and leading == 3:
        fits = shape_of(target)[options.slice_dim] == shape_of(logits)[options.slice_dim]
    if not fits:
        remedy = "a plane of 0 and 1 a class"
        if target.dim() == logits.dim() - 1:
            remedy = (
                "for classes that exclude each other use mode='multiclass'; or make planes of the labels with "
                f"torch.nn.functional.one_hot(target.long(), {c}).movedim(-1, 1)"
            )
        elif target.dim() == logits.dim() and shape_of(target)[:2] == (n, c):
            remedy = "pass upsample='bilinear' to have the logits scaled up to the target's size"
        raise ValueError(
            f"with mode='multilabel' the target must have the shape of the logits, {list(shape_of(logits))}, "
            f"got {list(shape_of(target))}; {remedy}"
        )
    shape = shape_of(target)
    slices = 1
    if logits.dim() == 5:
        logits, target = logits.movedim(options.slice_dim, 2), target.movedim(options.slice_dim, 2)
        slices = shape_of(logits)[2]

    def plane(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = of_pixels(name, tensor, shape, many=True)
        return tensor.movedim(options.slice_dim, 2) if len(shape) == 5 else tensor

    weight = plane_weights(call.weight, call.pos_weight, c, slices, logits)
    pixel_weight = plane("pixel_weight", call.pixel_weight)
    soft = target.is_floating_point()
    logits, target, valid = _joined(logits.dim() - 3, logits, target, plane("valid_mask", call.valid))
    folded_call = Call(
        logits=logits.unsqueeze(-3),
        target=target.unsqueeze(-3) if soft else target,
        valid=valid,
        weight=weight,
        pos_weight=None,
        pixel_weight=None if pixel_weight is None else pixel_weight.flatten(0, -3),
    )
    return folded_call, replace(options, mode="binary"), shape


def _joined(seams: int, logits: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first dimensions, one more than seams, as one; or as two where no strides lead through them in one step.

    Logits are copied only where there would be three.
    """
    tensors = [tensor for tensor in (logits, target, valid) if tensor is not None]
    while seams:
        free = [i for i in range(seams) if all(_is_even(tensor, i) for tensor in tensors)]
        if not free and seams == 1:
            break
        at = free[0] if free else 0
        tensors = [tensor.flatten(at, at + 1) for tensor in tensors]
        seams -= 1
    return tensors[0], tensors[1], tensors[2] if valid is not None else None


def _is_even(tensor: Tensor, dim: int) -> bool:
    """Whether one stride leads through this dimension and the next."""
    sizes, stride = shape_of(tensor)[dim : dim + 2], tensor.stride()
    return 0 in shape_of(tensor) or 1 in sizes or stride[dim] == stride[dim + 1] * sizes[1]


def plane_weights(
    weight: Tensor | None, pos_weight: Tensor | None, num_planes: int, slices: int, like: Tensor
) -> Tensor | None:
    """[P,2] (or [2] for one): cross-entropy's weights of background and foreground of each plane; None where all are 1.

    Formula: torch.nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight), both [C].
    """
    if weight is None and pos_weight is None:
        return None
    ones = torch.ones(num_planes, dtype=torch.float32, device=like.device)
    of_plane = ones if weight is None else ones * _one_a_class("weight", weight, num_planes)
    positive = of_plane if pos_weight is None else of_plane * _one_a_class("pos_weight", pos_weight, num_planes)
    rows = torch.stack([of_plane, positive], dim=1).repeat_interleave(slices, dim=0)
    return rows[0] if shape_of(rows)[0] == 1 else rows


def _one_a_class(name: str, tensor: Tensor, num_classes: int) -> Tensor:
    count = untraced(tensor.numel)
    if tensor.dim() > 1 or (count != 1 and count != num_classes):
        raise ValueError(
            f"with mode='multilabel' {name} must hold one number a class, shape [{num_classes}], "
            f"got shape {list(shape_of(tensor))}"
        )
    return tensor.to(torch.float32).reshape(-1)


def of_pixels(name: str, tensor: Tensor, shape: tuple[int, ...], many: bool = False) -> Tensor:
    """A mask or weights of the target's pixels, in their shape; `many`: of planes, which may share them.

    Raises:
        ValueError: it has another shape.
    """
    if shape_of(tensor) == shape:
        return tensor
    if many and shape_of(tensor) == (shape[0], *shape[2:]):
        return tensor.unsqueeze(1).expand(shape)
    if not many and tensor.dim() == len(shape) + 1 and shape_of(tensor) == (shape[0], 1, *shape[1:]):
        return tensor.squeeze(1)
    shared = f", or {[shape[0], *shape[2:]]} for all planes" if many else ""
    raise ValueError(
        f"{name} must have the shape {list(shape)} of the target's pixels{shared}, got {list(shape_of(tensor))}"
    )


def binary_weights(weight: Tensor | None, pos_weight: Tensor) -> Tensor:
    """[2], cross-entropy's weights of background and foreground in binary mode."""
    positive = torch.cat([torch.ones_like(pos_weight.reshape(-1)), pos_weight.reshape(-1)]).to(torch.float32)
    return positive if weight is None else weight * positive


def unfolded(tensor: Tensor, shape: tuple[int, ...] | None, many: bool, options: LossOptions) -> Tensor:
    """A map of folded images in the shape of the target's pixels; `many`: of planes of overlapping classes."""
    if shape is None:
        return tensor
    lead = 2 if many else 1  # dimensions in front of the slices
    if len(shape) < lead + 3:
        return tensor.reshape(shape)
    over = options.slice_dim if many else options.slice_dim - 1
    moved = list(shape)
    moved.insert(lead, moved.pop(over))
    return tensor.reshape(moved).movedim(lead, over)
