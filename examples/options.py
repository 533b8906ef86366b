"""The command line of examples/train.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semeda_fast.schedule import ramp

# What may differ between the first start and --resume, because it changes no result.
FREE = {
    *("class_names", "workers", "cache", "output", "resume", "pictures", "traceback"),
    *("checkpoint_every", "log_every", "val_every", "keep_epoch"),
}


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """The options; paths are absolute. A wrong option ends the program with exit code 2 and a message."""
    parser = argparse.ArgumentParser(description=description)

    add = parser.add_argument_group("data").add_argument
    add("--images", type=Path, required=True, help="folder of training images")
    add("--masks", type=Path, required=True, help="folder of their masks, named like the images")
    add("--val-images", type=Path, help="folder of validation images")
    add("--val-masks", type=Path, help="folder of their masks")
    add("--val-fraction", type=_fraction, default=0.2, help="part held out without --val-images (0.2)")
    add("--limit", type=_at_least(1), metavar="N", help="use at most N images of each set, evenly spaced")
    add("--num-classes", type=_at_least(2), required=True, help="labels are 0 .. N-1")
    add("--ignore-index", type=int, default=255, help="label of void pixels (255)")
    add("--class-names", type=lambda text: text.split(","), help="names for the report, with commas between")
    add("--size", type=_size, metavar="HxW", help="resize images and masks to this size")
    add("--crop", type=_size, metavar="HxW", help="train on random crops of this size")
    add("--cache", action="store_true", help="keep decoded images in memory (each worker its own)")
    add("--workers", type=_at_least(0), default=0, help="processes that load data, per process (0)")

    add = parser.add_argument_group("network and loss").add_argument
    add("--network", default="unet", help="unet, or a transformers model type, .json file or local folder")
    add("--width", type=_at_least(1), default=16, help="channels of the U-Net at full resolution (16)")
    add("--depth", type=_at_least(1), default=3, help="times that the U-Net halves the resolution (3)")
    add("--norm", choices=("group", "batch"), default="group", help="of the U-Net; batch learns faster from scratch")
    add("--loss", choices=("ce", "ce+semeda"), default="ce+semeda")
    add("--class-weights", choices=("none", "enet"), default="none", help="of cross-entropy: enet favours rare classes")
    add("--proxy", help="file of an edge proxy (default: the bundled one)")
    add("--lambda-semeda", type=float, help="weight of the SEMEDA term (default: the library's)")
    add("--semeda-start", type=float, default=0.0, metavar="E", help="keep it at 0 for E epochs")
    add("--semeda-ramp", type=float, default=0.0, metavar="E", help="then raise it from 0 over E epochs")
    add("--semeda-power", type=float, default=1.0, metavar="P", help="as (part of the ramp)^P (1: a straight line)")
    add("--layer-weights", type=_numbers, metavar="W,...", help="of the SEMEDA term (default: the proxy's)")
    add("--distance", choices=("l1", "l2", "smooth_l1"), help="of the SEMEDA term (default: the proxy's)")
    add("--backend", default="auto", help="backend of SEMEDA: auto, reference, cpu, triton, cuda")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_at_least(1), default=50)
    add("--batch-size", type=_at_least(1), default=8, help="images per step, over all processes (8)")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=1e-2)
    add("--seed", type=_at_least(0), default=0)
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    add("--channels-last", action="store_true", help="memory order of the network; often faster")
    add("--compile", action="store_true", help="torch.compile the network and the criterion")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="folder for logs, checkpoint and report")
    add("--resume", action="store_true", help="go on with the run in --output, if there is one")
    add("--branch", type=Path, metavar="FILE", help="start from this checkpoint of a run, with other settings")
    add("--weights", type=Path, metavar="FILE", help="start with the network of this checkpoint, in a new run")
    add("--keep-epoch", type=_at_least(1), metavar="E", help="keep the checkpoint after E epochs, as checkpoint-E.pt")
    add("--checkpoint-every", type=_at_least(1), default=200, help="steps between checkpoints (200)")
    add("--log-every", type=_at_least(1), default=10, help="steps between rows of log.csv (10)")
    add("--val-every", type=_at_least(1), default=1, help="epochs between validations (1)")
    add("--boundary-tolerance", type=float, default=2.0, help="reach of boundary F in pixels (2)")
    add("--pictures", type=_at_least(1), default=4, help="validation images in predictions.png (4)")
    add("--traceback", action="store_true", help="on an error, show the traceback too")

    args = parser.parse_args(argv)
    for name in ("images", "masks", "val_images", "val_masks", "output", "branch", "weights"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).resolve())
    if (args.val_images is None) != (args.val_masks is None):
        parser.error("--val-images and --val-masks belong together: give both or neither")
    if args.branch is not None and args.weights is not None:
        parser.error("--branch goes on with a run and --weights starts a new one: give one of them")
    if args.class_names is not None and len(args.class_names) != args.num_classes:
        parser.error(f"--class-names has {len(args.class_names)} names for --num-classes {args.num_classes}")
    try:
        ramp(0.0, args.semeda_start, args.semeda_ramp, args.semeda_power)
    except ValueError as error:
        parser.error(f"--semeda-start, --semeda-ramp, --semeda-power: {error}")
    return args


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return int(text)

    return integer


def _fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return float(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be HxW such as 384x512, got {text!r}")
    return int(parts[0]), int(parts[1])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result of a run."""
    return {name: value for name, value in vars(args).items() if name not in FREE}
