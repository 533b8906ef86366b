"""What a finished run shows: metrics, a table, and a picture of predictions."""

from __future__ import annotations

import json
import math
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from data import Pairs, make_loader, to_tensor
from PIL import Image
from runfiles import RunFolder
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from semeda_fast.files import atomic_path
from semeda_fast.metrics import BoundaryF, BoundaryIoU

WHITE = np.uint8(255)  # the colour of void
BLACK = np.uint8(0)  # the colour of errors


@torch.no_grad()
def evaluate(
    network: nn.Module,
    dataset: Pairs,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    tolerance: float,
) -> dict[str, Any]:
    """mIoU, boundary IoU and boundary F over a whole data set, by all processes together.

    Each process takes every n-th image. torchmetrics sums the counts of all processes before it divides, so
    no image counts twice, however they are dealt.
    """
    classes, ignore_index = dataset.num_classes, dataset.ignore_index
    metrics = MetricCollection(
        {
            "miou": MulticlassJaccardIndex(classes, average="macro", ignore_index=ignore_index),
            "class_iou": MulticlassJaccardIndex(classes, average="none", ignore_index=ignore_index),
            "boundary_iou": BoundaryIoU(classes, ignore_index=ignore_index),
            "boundary_f": BoundaryF(classes, tolerance=tolerance, ignore_index=ignore_index),
        }
    ).to(accelerator.device)
    mine = [(0, index) for index in range(accelerator.process_index, len(dataset), accelerator.num_processes)]
    # Without a common size each image is a batch of its own.
    step = max(1, batch_size // accelerator.num_processes) if dataset.size else 1
    batches = [mine[i : i + step] for i in range(0, len(mine), step)]
    # Not the DDP wrapper: its forward expects the same number of calls in every process.
    network = accelerator.unwrap_model(network).eval()
    for images, target in make_loader(dataset, batches, workers):
        prediction = network(images.to(accelerator.device)).argmax(dim=1)
        metrics.update(prediction, target.to(accelerator.device))
    return {name: value.tolist() for name, value in metrics.compute().items()}


def write_report(run: RunFolder, network: nn.Module, dataset: Pairs, metrics: dict[str, Any], args: Namespace) -> str:
    """Write report.json, report.md, predictions.png and predictions/; returns the table as Markdown."""
    times = [float(row["step_time_s"]) for row in run.rows() if row["kind"] == "train"]
    step_time = statistics.median(times)
    names = args.class_names or [str(label) for label in range(dataset.num_classes)]
    report = {
        "loss": args.loss,
        "miou": _plain(metrics["miou"]),
        "boundary_iou": _plain(metrics["boundary_iou"]),
        "boundary_f": _plain(metrics["boundary_f"]),
        "boundary_f_tolerance_px": args.boundary_tolerance,
        "step_time_median_s": step_time,
        "validation_images": len(dataset),
        "class_iou": dict(zip(names, map(_plain, metrics["class_iou"]), strict=True)),
    }
    table = (
        f"| loss | mIoU | boundary IoU | boundary F ({args.boundary_tolerance:g} px) | step time (median) |\n"
        "|---|---|---|---|---|\n"
        f"| {args.loss} | {metrics['miou']:.4f} | {metrics['boundary_iou']:.4f} "
        f"| {metrics['boundary_f']:.4f} | {1000 * step_time:.1f} ms |\n"
    )
    run.write("report.json", json.dumps(report, indent=2) + "\n")
    run.write("report.md", f"{table}\nMeasured on {len(dataset)} validation images.\n")
    chosen = np.linspace(0, len(dataset) - 1, min(args.pictures, len(dataset))).round().astype(int)
    draw_predictions(run.folder, network, dataset, chosen.tolist(), names)
    return table


@torch.no_grad()
def draw_predictions(folder: Path, network: nn.Module, dataset: Pairs, indices: list[int], names: list[str]) -> None:
    """predictions.png: image, ground truth, prediction, error; predictions/NAME.png: the labels."""
    device = next(network.parameters()).device
    (folder / "predictions").mkdir(exist_ok=True)
    wide = np.uint8 if dataset.num_classes <= 256 else np.uint16  # grey PNGs of 8 or 16 bits
    rows = []
    for index in indices:
        image, mask = dataset.read(index)
        logits: Tensor = network(to_tensor(image)[None].to(device))
        prediction = logits[0].argmax(dim=0).cpu().numpy().astype(wide)
        name = dataset.pairs[index][1].stem
        with atomic_path(folder / "predictions" / f"{name}.png", overwrite=True) as path:
            Image.fromarray(prediction).save(path)
        rows.append((name, image, mask, prediction))
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("predictions.png is left out: it needs matplotlib (pip install 'semeda-fast[plot]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colours = palette(dataset.num_classes)
    height, width = rows[0][1].shape[:2]
    size = (12, 3 * len(rows) * height / width + 1)
    figure, axes = plt.subplots(len(rows), 4, figsize=size, squeeze=False, layout=ConstrainedLayoutEngine(h_pad=0.08))
    for line, (name, image, mask, prediction) in zip(axes, rows, strict=True):
        valid = mask != dataset.ignore_index
        wrong = valid & (prediction != mask)
        line[0].imshow(image)
        line[1].imshow(paint(mask, colours, valid))
        line[2].imshow(paint(prediction, colours))
        line[3].imshow(error_map(image, wrong, valid))
        line[0].set_ylabel(name, fontsize=8)
        line[3].set_xlabel(f"{wrong.sum() / max(1, valid.sum()):.1%} of the pixels wrong", fontsize=8)
    for axis, text in zip(axes[0], ("image", "ground truth", "prediction", "error"), strict=True):
        axis.set_title(text)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    present = {int(label) for _, _, mask, found in rows for label in np.unique([mask, found])}
    add_legend(figure, present - {dataset.ignore_index}, names, colours)
    with atomic_path(folder / "predictions.png", overwrite=True) as path:
        figure.savefig(path, dpi=110)
    plt.close(figure)


def palette(num_classes: int) -> np.ndarray:
    """Colours uint8 [C,3]: easy to tell apart up to 20 classes, spread over the hues beyond."""
    import matplotlib

    if num_classes <= 20:
        paired = matplotlib.colormaps["tab20"](np.arange(20))[:, :3]
        colours = np.concatenate([paired[0::2], paired[1::2]])[:num_classes]  # the ten saturated ones first
    else:
        colours = matplotlib.colormaps["hsv"]((np.arange(num_classes) * 0.618034) % 1.0)[:, :3]
    return (255 * colours).astype(np.uint8)


def add_legend(figure: Any, labels: set[int], names: list[str], colours: np.ndarray) -> None:
    """Name the colours of `labels` (the first 40), of void and of errors below the figure."""
    from matplotlib.patches import Patch

    patches = [Patch(color=_hex(colours[label]), label=names[label]) for label in sorted(labels)[:40]]
    patches.append(Patch(facecolor="white", edgecolor="grey", label="void"))
    patches.append(Patch(color="black", label="wrong"))
    figure.legend(handles=patches, loc="outside lower center", ncols=10, fontsize=8, frameon=False)


def paint(labels: np.ndarray, colours: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Labels [H,W] -> RGB uint8 [H,W,3]; white where `valid` is False."""
    if valid is None:
        return colours[labels]
    return np.where(valid[..., None], colours[np.where(valid, labels, 0)], WHITE)


def error_map(image: np.ndarray, wrong: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """RGB uint8 [H,W,3]: the image in pale grey, wrong pixels black, void white."""
    grey = (140 + 0.3 * image.mean(axis=2)).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture[wrong] = BLACK
    picture[~valid] = WHITE
    return picture


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
