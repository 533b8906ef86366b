"""What the accuracy study trains: the common settings, and the recipes that are compared."""

from __future__ import annotations

from dataclasses import dataclass

# Half resolution, a small U-Net from scratch.
TRAINING = (
    *("--size", "180x240", "--cache", "--width", 8, "--depth", 4, "--norm", "batch", "--channels-last"),
    *("--mixed-precision", "bf16", "--compile", "--epochs", 30, "--batch-size", 8, "--lr", 3e-3),
    *("--val-every", 5, "--pictures", 1, "--checkpoint-every", 100000),
)
BRANCH_EPOCH = 20


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: of the runs' folders.
        title: in tables.
        options: of examples/train.py, beside TRAINING.
        base: name of the recipe it is compared with; "" for one of those.
        branch: name of the recipe whose checkpoint after BRANCH_EPOCH epochs it starts from; "": from the beginning.
    """

    name: str
    title: str
    options: tuple[str | int | float, ...]
    base: str = ""
    branch: str = ""


RECIPES = (
    Recipe("ce", "cross-entropy", ("--loss", "ce")),
    Recipe("wce", "cross-entropy with class weights", ("--loss", "ce", "--class-weights", "enet")),
)
BASES = tuple(recipe.name for recipe in RECIPES if not recipe.base)
