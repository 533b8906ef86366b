"""How the bundled universal proxy was made: `python -m semeda_fast.proxy.universal --output FILE`.

The class columns of a proxy's first layer are independent. So one network with 256 of them, trained on synthetic
masks whose few classes are dealt to other columns at each step, serves any number of classes: it is cut to its first C.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import atomic_path
from .network import EdgeProxy
from .quality import edge_quality
from .synthetic import SyntheticMasks
from .training import train_proxy

NUM_CLASSES = 256
CLASSES_AT_ONCE = 16  # a sixteenth of the work of all 256
REPORTED_CLASSES = (2, 19, 21, 150)
TRAIN_MASKS, VAL_MASKS = 20_000, 100
MASK_SIZE = (48, 48)
VAL_SEED = 1_000_003  # far from the training seed: no mask is seen in both


def train_universal(*, steps: int, seed: int = 0, progress: bool = True, **options: Any) -> EdgeProxy:
    """Train the universal proxy; its quality holds the edge F1 on unseen synthetic masks of several class counts.

    `options` go to `train_proxy`, such as its noise.
    """
    proxy = train_proxy(
        SyntheticMasks(TRAIN_MASKS, CLASSES_AT_ONCE, MASK_SIZE, seed=seed),
        CLASSES_AT_ONCE,
        columns=NUM_CLASSES,
        val_masks=SyntheticMasks(VAL_MASKS, NUM_CLASSES, (96, 96), seed=VAL_SEED),
        steps=steps,
        crop_size=MASK_SIZE[0],
        seed=seed,
        progress=progress,
        **options,
    )
    return proxy.annotated(
        provenance={**proxy.provenance, "masks": f"synthetic, {NUM_CLASSES} classes", "universal": True},
        quality={**proxy.quality, "edge_f1_by_classes": f1_by_classes(proxy)},
    )


def f1_by_classes(proxy: EdgeProxy) -> dict[str, float]:
    """Edge F1 on unseen synthetic masks of 2, 19, 21 and 150 classes, each with the proxy cut to them."""
    return {
        str(c): round(
            edge_quality(proxy.slice_classes(c), SyntheticMasks(VAL_MASKS, c, (96, 96), seed=VAL_SEED))["edge_f1"],
            4,
        )
        for c in REPORTED_CLASSES
    }


def main() -> None:
    """Train, print the quality, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with atomic_path(options.output, overwrite=options.overwrite) as temporary:  # fails before the training
        proxy = train_universal(steps=options.steps, seed=options.seed)
        proxy.save(temporary, overwrite=True)
    for name, value in proxy.quality.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
