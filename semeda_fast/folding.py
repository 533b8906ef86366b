"""More shapes of the same loss: volumes, overlapping classes and labels with a channel, as batches of images.

Each is a batch of images to the backends: slices of a volume, planes of overlapping classes. Folding changes strides;
it copies logits only where no strides say it (docs/how/shapes.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

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
    if target.dim() == 4 and not target.is_floating_point() and target.shape[1] == 1:
        call = call._replace(target=target.squeeze(1))
    return call, options, None


def _slices(call: Call, options: LossOptions) -> tuple[Call, LossOptions, tuple[int, ...]]:
    """A volume [N,C,D,H,W]: its slices along slice_dim are images."""
    logits, target = call.logits, call.target
    n, c, *volume = logits.shape
    dim = options.slice_dim
    channels = (1, 2) if options.mode == "binary" else (c,)
    soft = target.is_floating_point()
    if soft and target.dim() == 5 and target.shape[1] in channels:
        sizes = (target.shape[0], *target.shape[2:])
    else:
        if target.dim() == 5 and target.shape[1] == 1 and not soft:
            target = target.squeeze(1)
        sizes = tuple(target.shape) if not soft else ()
    _check_volume(call, options, sizes, (n, *volume))
    shape = tuple(sizes)
    over = dim - 1  # of what has no channels
    target = target.movedim(dim if soft else over, 1).flatten(0, 1)

    def pixels(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _of_shape(name, tensor, shape).movedim(over, 1).flatten(0, 1)

    return (
        call._replace(
            logits=logits.movedim(dim, 1).flatten(0, 1),
            target=target,
            valid=pixels("valid_mask", call.valid),
            pixel_weight=pixels("pixel_weight", call.pixel_weight),
        ),
        options,
        shape,
    )


def _check_volume(call: Call, options: LossOptions, sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Labels of a volume fit; with upsample the slices may be smaller than those of the labels."""
    fits = len(sizes) == 4
    if fits:
        along = options.slice_dim - 1
        same = (0, along) if options.upsample else (0, 1, 2, 3)
        fits = all(sizes[i] == expected[i] for i in same)
    if not fits:
        n, d, h, w = expected
        c = call.logits.shape[1]
        kind = f"[{n},{c},{d},{h},{w}]" if call.target.is_floating_point() else f"[{n},{d},{h},{w}]"
        remedy = ""
        if options.upsample:
            remedy = f"; upsample scales slices alone, so the sizes along slice_dim={options.slice_dim} must be equal"
        elif len(sizes) == 4 and sizes[0] == n:
            remedy = "; scale the logits with torch.nn.functional.interpolate(logits, size=target.shape[-3:])"
        raise ValueError(
            f"the target of a volume of shape {list(call.logits.shape)} must have the shape {kind}, "
            f"got {list(call.target.shape)}, {call.target.dtype}{remedy}"
        )


def _planes(call: Call, options: LossOptions) -> tuple[Call, LossOptions, tuple[int, ...]]:
    """Overlapping classes [N,C,H,W] or [N,C,D,H,W]: each plane is a binary image."""
    logits, target = call.logits, call.target
    if logits.dim() not in (4, 5):
        raise ValueError(
            f"with mode='multilabel' logits must have the shape [N,C,H,W] or [N,C,D,H,W], got {list(logits.shape)}"
        )
    small = options.upsample is not None
    leading = 2 + (1 if small and logits.dim() == 5 else 0)
    n, c = logits.shape[:2]
    fits = target.dim() == logits.dim() and target.shape[:2] == logits.shape[:2]
    if fits and not small:
        fits = target.shape == logits.shape
    elif fits and leading == 3:
        fits = target.shape[options.slice_dim] == logits.shape[options.slice_dim]
    if not fits:
        remedy = "a plane of 0 and 1 a class"
        if target.dim() == logits.dim() - 1:
            remedy = (
                "for classes that exclude each other use mode='multiclass'; or make planes of the labels with "
                f"torch.nn.functional.one_hot(target.long(), {c}).movedim(-1, 1)"
            )
        elif target.dim() == logits.dim() and target.shape[:2] == (n, c):
            remedy = "pass upsample='bilinear' to have the logits scaled up to the target's size"
        raise ValueError(
            f"with mode='multilabel' the target must have the shape of the logits, {list(logits.shape)}, "
            f"got {list(target.shape)}; {remedy}"
        )
    shape = tuple(target.shape)
    slices = 1
    if logits.dim() == 5:
        logits, target = logits.movedim(options.slice_dim, 2), target.movedim(options.slice_dim, 2)
        slices = logits.shape[2]

    def plane(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dim() == len(shape) - 1:
            tensor = tensor.unsqueeze(1).expand(shape) if tensor.shape == (n, *shape[2:]) else tensor
        tensor = _of_shape(name, tensor, shape)
        return (tensor.movedim(options.slice_dim, 2) if len(shape) == 5 else tensor).flatten(0, -3)

    images = target.flatten(0, -3)
    return (
        Call(
            logits=logits.flatten(0, -3).unsqueeze(1),
            target=images.unsqueeze(1) if target.is_floating_point() else images,
            valid=plane("valid_mask", call.valid),
            weight=plane_weights(call.weight, call.pos_weight, c, slices, logits),
            pos_weight=None,
            pixel_weight=plane("pixel_weight", call.pixel_weight),
        ),
        replace(options, mode="binary"),
        shape,
    )


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
    return rows[0] if rows.shape[0] == 1 else rows


def _one_a_class(name: str, tensor: Tensor, num_classes: int) -> Tensor:
    if tensor.numel() not in (1, num_classes) or tensor.dim() > 1:
        raise ValueError(
            f"with mode='multilabel' {name} must hold one number a class, shape [{num_classes}], "
            f"got shape {list(tensor.shape)}"
        )
    return tensor.to(torch.float32).reshape(-1)


def _of_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    if tensor.dim() == len(shape) + 1 and tensor.shape[1] == 1 and tuple(tensor.squeeze(1).shape) == shape:
        return tensor.squeeze(1)
    raise ValueError(f"{name} must have the shape {list(shape)} of the target's pixels, got {list(tensor.shape)}")


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
