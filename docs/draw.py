"""The pictures of the site, drawn anew: `python docs/draw.py` writes docs/pictures/*.png.

Scenes are synthetic (examples/scenes.py), figures come from benchmarks/results. Text and lines are mid-grey on
nothing, so that each picture serves the light and the dark page.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from semeda_fast import EdgeProxy, semeda_loss
from semeda_fast.files import atomic_path
from semeda_fast.inspection import PALETTE, damaged_labels
from semeda_fast.schedule import ramp

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
GREY, BLUE, ORANGE, VOID = "#808890", "#4f8fc7", "#d98c3c", 255
REACH = range(-3, 4)
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "axes.titlecolor": GREY,
    "legend.edgecolor": GREY,
    "legend.framealpha": 0.0,
    "font.size": 11,
    "savefig.transparent": True,
    "savefig.dpi": 160,
}


def main() -> None:
    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
    PICTURES.mkdir(exist_ok=True)
    for draw in (draw_terms, draw_loss, draw_ramp, draw_metrics, draw_gains, draw_cost):
        save(draw(), draw.__name__.removeprefix("draw_"))
    draw_inspect()


def save(figure: Figure, name: str) -> None:
    with atomic_path(PICTURES / f"{name}.png", overwrite=True) as path:
        figure.savefig(path, format="png", metadata={"Software": None})
    print(PICTURES / f"{name}.png")


def scene(number: int, size: tuple[int, int] = (96, 128)) -> torch.Tensor:
    """Labels of a street scene, [H,W] int64, 8 classes; void where the scene has it."""
    sys.path.insert(0, str(ROOT / "examples"))
    from scenes import make_scene  # type: ignore[import-not-found]

    return torch.from_numpy(make_scene(size, np.random.default_rng(number))[1].astype(np.int64))


def draw_terms() -> Figure:
    """Ground truth, a prediction with known mistakes, and both terms at each pixel."""
    target = scene(6)
    valid = target != VOID
    predicted, _ = damaged_labels(target.where(valid, 0), valid, 8)
    truth = target.where(valid, predicted)
    sure = 0.7 * F.one_hot(predicted, 8) + 0.3 * F.one_hot(truth, 8)  # unsure where it is wrong, as networks are
    sure = 0.98 * sure + 0.02 / 8
    soft = F.avg_pool2d(F.pad(sure.movedim(2, 0)[None].float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    maps = {}
    for name, weights in {"cross-entropy": (1.0, 0.0), "SEMEDA": (0.0, 1.0)}.items():
        loss = semeda_loss(
            soft.log(),
            target[None],
            EdgeProxy.bundled(8),
            lambda_ce=weights[0],
            lambda_semeda=weights[1],
            ignore_index=VOID,
            reduction="none",
        )
        assert isinstance(loss, torch.Tensor)
        maps[name] = loss[0].numpy()
    figure = Figure(figsize=(6, 4.9), layout="constrained")
    grid = figure.subplots(2, 2)
    show_labels(grid[0, 0], target, "ground truth")
    show_labels(grid[0, 1], predicted.where(valid, VOID), "a prediction, errors outlined")
    wrong = (valid & (predicted != target)).float().numpy()
    grid[0, 1].contour(wrong, levels=[0.5], colors="black", linewidths=1.0)
    for axes, (name, values) in zip(grid[1], maps.items(), strict=True):
        show_map(axes, values, f"what {name} sees")
    return figure


def draw_loss() -> Figure:
    """The computation as boxes."""
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 19.2), ylim=(0.9, 7.1))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str = GREY, wide: float = 3.0) -> None:
        frame: dict[str, Any] = {"boxstyle": "round,pad=0.1", "fc": "none", "ec": colour, "lw": 1.6}
        axes.add_patch(FancyBboxPatch((x - wide / 2, y - 0.6), wide, 1.2, **frame))
        axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=10)

    def arrow(begin: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=14, color=GREY, lw=1.3))
        axes.text((begin[0] + end[0]) / 2, begin[1] + 0.25, text, ha="center", fontsize=9)

    for y, given, made in ((6.2, "logits", "softmax"), (1.8, "labels", "one-hot")):
        box(1.7, y, given)
        box(6.4, y, made)
        box(11.6, y, "frozen edge\nnetwork", BLUE, wide=3.6)
        arrow((3.35, y), (4.75, y))
        arrow((8.05, y), (9.65, y))
        arrow((11.6, y - 0.75 if y > 4 else y + 0.75), (11.6, 4.85 if y > 4 else 3.15))
    box(11.6, 4.0, "distance,\nlayer by layer", ORANGE, wide=4.2)
    box(17.0, 4.0, "loss, with\ncross-entropy", ORANGE, wide=4.0)
    arrow((13.85, 4.0), (14.85, 4.0), r"$\times\lambda$")
    return figure


def draw_ramp() -> Figure:
    """lambda_semeda over the training for the two measured starts."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    steps = np.linspace(0, 1, 301)
    for title, start, length, colour in (
        ("ramp(step, 0.1 * steps, 0.1 * steps)", 0.1, 0.1, BLUE),
        ("ramp(step, 2 / 3 * steps, 0.07 * steps)", 2 / 3, 0.07, ORANGE),
    ):
        axes.plot(steps, [ramp(float(step), start, length) for step in steps], color=colour, lw=2.2, label=title)
    axes.set(xlabel="part of the training", ylabel="factor", ylim=(-0.05, 1.1), xlim=(0, 1))
    axes.legend(loc=(0.21, 0.4), fontsize=9)
    plain(axes)
    return figure


def draw_metrics() -> Figure:
    """The pixels that each metric looks at, for one mask."""
    target = scene(6)
    valid = target != VOID
    edges = unlike(target, [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])
    other = unlike(target, [(a, b) for a in REACH for b in REACH if a * a + b * b <= 9])
    bands = unlike(target, [(a, b) for a in REACH for b in REACH])
    bands[:3], bands[-3:], bands[:, :3], bands[:, -3:] = True, True, True, True  # the image's frame ends a mask
    figure = Figure(figsize=(6, 4.9), layout="constrained")
    grid = figure.subplots(2, 2)
    show_labels(grid[0, 0], target, "the mask")
    show_map(grid[0, 1], (bands & valid).float().numpy(), "BoundaryIoU: bands of 3 pixels")
    show_map(grid[1, 0], (other & valid).float().numpy(), "TrimapIoU: within 3 pixels of a border")
    show_map(grid[1, 1], (edges & valid).float().numpy(), "BoundaryF: contours")
    return figure


def unlike(labels: torch.Tensor, offsets: list[tuple[int, int]]) -> torch.Tensor:
    """Bool [H,W]: another valid label lies at one of the offsets, each of at most 3 pixels."""
    height, width = labels.shape
    wide = F.pad(labels[None].float(), (3, 3, 3, 3), mode="replicate")[0].long()
    shifted = torch.stack([wide[3 + a : 3 + a + height, 3 + b : 3 + b + width] for a, b in offsets])
    return ((shifted != labels) & (shifted != VOID)).any(0) & (labels != VOID)


def draw_gains() -> Figure:
    """Differences to class-weighted cross-entropy, means over seeds with 95 % intervals, from study.json."""
    runs = json.loads((RESULTS / "camvid-half-resolution" / "study.json").read_text(encoding="utf-8"))["runs"]
    found = {(run["recipe"], run["seed"]): run for run in runs}
    rows = (
        ("L2 0.03 after a tenth", "w-l2-early", "wce"),
        ("same, proxy of exact masks", "w-l2-plain-early", "wce"),
        ("L2 0.03 in the last third", "w-l2-003", "wce"),
        ("fine-tuning, L2 0.03", "ft-l2-003", "ft-wce"),
        ("L1 0.1 from the first step", "w-constant", "wce"),
    )
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, metric, title in zip(panels, ("miou", "boundary_f"), ("mIoU", "boundary F"), strict=True):
        for row, (_, recipe, base) in enumerate(rows):
            values = [run[metric] - found[base, seed][metric] for (name, seed), run in found.items() if name == recipe]
            mean, half = interval(values)
            axes.errorbar(mean, row, xerr=half, fmt="o", color=BLUE if abs(mean) > half else GREY, capsize=3)
        axes.axvline(0, color=GREY, lw=1)
        axes.set_title(f"gain in {title}", fontsize=11)
        plain(axes)
    panels[0].set_yticks(range(len(rows)), [row[0] for row in rows])
    panels[0].invert_yaxis()
    return figure


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of Student's 95 % interval."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def draw_cost() -> Figure:
    """Medians of the headline workload, from results.json."""
    records = json.loads((RESULTS / "cpu-zen4-2-cores" / "results.json").read_text(encoding="utf-8"))["records"]
    times: dict[tuple[str, str], float] = {}
    for record in records:
        wanted = record["kind"] == "time" and record["suite"] == "headline" and record["mode"] == "fwdbwd"
        if wanted and record["workload"]["dtype"] == "float32":
            times[record["contender"], record["allocator"]] = 1000 * statistics.median(record["seconds"])
    rows = (
        ("cross-entropy alone", ("ce",)),
        ("+ SEMEDA, plain PyTorch", ("reference", "reference_cl")),
        ("+ SEMEDA, torch.compile", ("compiled", "compiled_cl")),
        ("+ SEMEDA, semeda_fast", ("cpu", "cpu_cl")),
    )
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for offset, allocator, colour in ((-0.19, "default", BLUE), (0.19, "tuned", ORANGE)):
        best = [min(times[name, allocator] for name in names) for _, names in rows]
        bars = axes.barh(
            [row + offset for row in range(len(rows))], best, 0.36, color=colour, label=f"{allocator} malloc"
        )
        axes.bar_label(bars, [f"{value:.{0 if value > 100 else 1}f}" for value in best], padding=4, color=GREY)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms, forward + backward, 2x21x512x512, two cores")
    axes.legend(loc="lower right")
    plain(axes)
    return figure


def draw_inspect() -> None:
    """What `semeda-fast inspect` draws, in this script's colours."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        style = "\n".join(f"{key}: {str(value).lstrip('#')}" for key, value in STYLE.items() if key != "font.size")
        (folder / "matplotlibrc").write_text(style.replace("savefig.dpi: 160", "savefig.dpi: 75"), encoding="utf-8")
        scenes = [str(ROOT / "examples" / "scenes.py"), "scenes", "--train", "0", "--val", "1"]
        inspect = ["-m", "semeda_fast.cli", "inspect", "scenes/val/masks/scene_00000.png", "--output", "inspect.png"]
        subprocess.run([sys.executable, *scenes], cwd=folder, check=True)
        inspect += ["--num-classes", "8", "--ignore-index", str(VOID)]
        subprocess.run([sys.executable, *inspect], cwd=folder, check=True)
        with atomic_path(PICTURES / "inspect.png", overwrite=True) as path:
            path.write_bytes((folder / "inspect.png").read_bytes())
    print(PICTURES / "inspect.png")


def show_labels(axes: Axes, labels: torch.Tensor, title: str) -> None:
    colours = ListedColormap(PALETTE[:8]).with_extremes(bad="#b8b8b8")
    shown = np.ma.array(labels.numpy(), mask=(labels == VOID).numpy())
    axes.imshow(shown, cmap=colours, norm=BoundaryNorm(np.arange(9) - 0.5, 8), interpolation="nearest")
    frameless(axes, title)


def show_map(axes: Axes, values: np.ndarray[Any, Any], title: str) -> None:
    axes.imshow(values, cmap="cividis", vmin=0, vmax=float(np.quantile(values, 0.998)), interpolation="nearest")
    frameless(axes, title)


def frameless(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=11)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
