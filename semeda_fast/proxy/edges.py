"""Semantic edge labels of a label map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import not_ignored


def edge_labels(target: Tensor, *, radius: int = 1, ignore_index: int = -100) -> Tensor:
    """Which pixels lie at a semantic edge: another valid label stands within `radius` of them.

    The neighbourhood is the square of (2 radius + 1)^2 pixels, cut at the image's border. Void pixels are
    never edges and make none. With radius 1 this is the edge definition of the SEMEDA proxy (8 neighbours).

    Args:
        target: integer labels, [N,H,W] or [H,W].
        radius: in pixels, at least 1.
        ignore_index: the void label.

    Returns:
        bool tensor of target's shape.

    Raises:
        ValueError: radius below 1, or a tensor of another rank.
        TypeError: labels that are not integers.
    """
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"edge_labels expects integer labels, got {target.dtype}; argmax a distribution first")
    if target.dim() not in (2, 3):
        raise ValueError(f"edge_labels expects labels of shape [N,H,W] or [H,W], got {list(target.shape)}")
    if radius < 1:
        raise ValueError(f"radius must be at least 1 pixel, got {radius}")
    labels = target if target.dim() == 3 else target.unsqueeze(0)
    valid = not_ignored(labels, ignore_index)
    # Two labels differ within the window exactly if the window's largest and smallest valid label differ.
    # float64 holds every label exactly and is what max_pool2d takes on every device that has it.
    values = labels.to(torch.float32 if labels.dtype in (torch.uint8, torch.int8, torch.int16) else torch.float64)
    highest = _window_max(torch.where(valid, values, -torch.inf), radius)
    lowest = -_window_max(torch.where(valid, -values, -torch.inf), radius)
    edges = valid & (highest != lowest)
    return edges if target.dim() == 3 else edges.squeeze(0)


def _window_max(x: Tensor, radius: int) -> Tensor:
    """Maximum over the square window; rows, then columns."""
    size = 2 * radius + 1
    x = F.max_pool2d(x.unsqueeze(1), (size, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(x, (1, size), stride=1, padding=(0, radius)).squeeze(1)
