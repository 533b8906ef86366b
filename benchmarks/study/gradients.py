"""How the two terms pull at a network's logits: norms, angle, and which classes each of them favours.

For the accuracy study: at checkpoints of its cross-entropy runs, the gradient of the SEMEDA term (lambda 1) beside
that of plain cross-entropy, on a fixed batch of training images.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semeda_fast import SemedaLoss

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IMAGES = 16
# name -> (layer weights, distance); None: the proxy's
TERMS: dict[str, tuple[tuple[float, ...] | None, str | None]] = {
    "all layers": (None, None),
    "layer 1": ((1, 0, 0), None),
    "layer 2": ((0, 1, 0), None),
    "layer 3": ((0, 0, 1), None),
    "all layers, smooth l1": (None, "smooth_l1"),
    "all layers, l2": (None, "l2"),
}


def gradient_facts(command: list[str], checkpoint: Path | None) -> dict[str, Any]:
    """Facts of one checkpoint.

    Args:
        command: the arguments of examples/train.py that its run was started with.
        checkpoint: None for the untrained network.

    Returns:
        the training classes' share of the batch, for each of TERMS the ratio of its gradient's norm to that of
        cross-entropy and their cosine, and for each class the mean force with which cross-entropy and the term lift
        the logit of a pixel's own class, in units of cross-entropy's largest (1: a pixel that gets probability 0).
    """
    sys.path.insert(0, str(_EXAMPLES))
    from data import make_datasets
    from options import parse_args
    from unet import build_network

    args: Namespace = parse_args(command, "")
    dataset, _ = make_datasets(args)
    torch.manual_seed(args.seed)
    network = build_network(args.network, args.num_classes, width=args.width, depth=args.depth, norm=args.norm)
    if checkpoint is not None:
        network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["network"])
    dataset.augment_seed = None
    chosen = [dataset[0, i * len(dataset) // IMAGES] for i in range(IMAGES)]
    images, target = (torch.stack(parts) for parts in zip(*chosen, strict=True))
    with torch.no_grad():
        logits = network.train()(images)
    return facts_of(logits, target, args.num_classes, args.ignore_index)


def facts_of(logits: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> dict[str, Any]:
    """The same of logits [N,C,H,W] and labels [N,H,W]."""
    valid = target != ignore_index
    labels = torch.where(valid, target, 0)
    members = [valid & (target == label) for label in range(num_classes)]

    def gradient(lambda_ce: float, lambda_semeda: float, weights: Any, distance: str | None) -> Tensor:
        leaf = logits.detach().clone().requires_grad_()
        criterion = SemedaLoss(
            num_classes=num_classes,
            ignore_index=ignore_index,
            lambda_ce=lambda_ce,
            lambda_semeda=lambda_semeda,
            layer_weights=weights,
            distance=distance,
        )
        (d_logits,) = torch.autograd.grad(criterion(leaf, target), leaf)
        return d_logits

    def pulls(d_logits: Tensor) -> list[float | None]:
        own = -d_logits.gather(1, labels.unsqueeze(1))[:, 0] * valid.sum()
        return [round(float(own[m].mean()), 3) if bool(m.any()) else None for m in members]

    plain = gradient(1.0, 0.0, None, None)
    found: dict[str, Any] = {
        "share": [round(float(m.sum() / valid.sum()), 4) for m in members],
        "ce_pull": pulls(plain),
        "terms": {},
    }
    for name, (weights, distance) in TERMS.items():
        other = gradient(0.0, 1.0, weights, distance)
        found["terms"][name] = {
            "norm_ratio": round(float(other.norm() / plain.norm()), 3),
            "cosine": round(float((other * plain).sum() / (other.norm() * plain.norm())), 3),
            "pull": pulls(other),
        }
    return found
