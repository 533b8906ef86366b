"""Plots of a run, PNG files beside its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from semeda_fast.files import atomic_path

from ..statistics import Interval
from ..timing import quartiles
from .tables import Record, median, overhead, scaling_value

COLOURS = {"default": "#4878a8", "tuned": "#c8843c"}
AXES = {"pixels": "pixels", "classes": "classes (1: binary)", "batch": "images in a batch", "threads": "threads"}


def draw_times(by_allocator: dict[str, list[Record]], title: str, path: Path) -> None:
    """Horizontal bars of the medians, whiskers to the quartiles, one colour an allocator."""
    names = list(dict.fromkeys(r["contender"] for rs in by_allocator.values() for r in rs if r["status"] == "ok"))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(by_allocator))
    for number, (allocator, records) in enumerate(by_allocator.items()):
        found = {record["contender"]: record for record in records if record["status"] == "ok"}
        places, values, errors = [], [], []
        for row, name in enumerate(names):
            if name in found:
                q1, middle, q3 = (1000 * value for value in quartiles(found[name]["seconds"]))
                places.append(row + number * height)
                values.append(middle)
                errors.append((middle - q1, q3 - middle))
        axes.barh(
            places,
            values,
            height,
            xerr=list(zip(*errors, strict=True)) if errors else None,
            color=COLOURS.get(allocator),
            label=f"{allocator} malloc",
        )
    axes.set_yticks([row + height * (len(by_allocator) - 1) / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("ms (median, quartiles)")
    axes.set_title(title, fontsize=10)
    axes.legend()
    _save(figure, path)


def draw_scaling(records: Sequence[Record], axis: str, title: str, path: Path) -> None:
    """Median time of each contender along an axis, both logarithmic; one line style an allocator."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines = dict.fromkeys((r["contender"], r["allocator"]) for r in records if r["status"] == "ok")
    for name, allocator in lines:
        points = sorted(
            (scaling_value(r, axis), 1000 * median(r))
            for r in records
            if (r["contender"], r["allocator"]) == (name, allocator) and r["status"] == "ok"
        )
        style = "-" if allocator == "default" else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=f"{name}, {allocator} malloc")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("ms (median)")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    if lines:
        axes.legend(fontsize=8)
    _save(figure, path)


def draw_memory(records: Sequence[Record], title: str, path: Path) -> None:
    """Peak above inputs and gradient of each contender."""
    able = [r for r in records if r["status"] == "ok" and r["above_inputs"] is not None]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(able)), layout="constrained")
    axes = figure.add_subplot()
    values = [max(0, r["above_inputs"] - r["gradient"]) / 2**20 for r in able]
    bars = axes.barh([r["contender"] for r in able], values, color="#4878a8")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("MiB above inputs and gradient (peak of one forward + backward)")
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def draw_overhead(grouped: Sequence[Sequence[Record]], title: str, path: Path) -> None:
    """Percent above a step with cross-entropy alone: one group of bars a network, one bar an implementation."""
    able = [group for group in grouped if any(overhead(record, group) for record in group)]
    names = list(dict.fromkeys(r["contender"] for group in able for r in group if overhead(r, group)))
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(able) * (len(names) + 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places, values, errors = [], [], []
        for row, group in enumerate(able):
            record = next((record for record in group if record["contender"] == name), None)  # not of every network
            found = overhead(record, group) if record else None
            if found is not None:
                places.append(row + number * height)
                values.append(100 * found.value)
                errors.append((100 * max(0.0, found.value - found.low), 100 * max(0.0, found.high - found.value)))
        bars = axes.barh(places, values, height, xerr=list(zip(*errors, strict=True)), label=name)
        axes.bar_label(bars, fmt="%+.1f", padding=6, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(able))], [group[0]["title_network"] for group in able])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("% above the step with cross-entropy alone (medians, 95 % intervals)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_differences(differences: Mapping[str, Mapping[str, Interval]], title: str, path: Path) -> None:
    """Mean differences of each recipe with 95 % intervals; one panel a metric."""
    names = list(differences)
    metrics = list(dict.fromkeys(metric for found in differences.values() for metric in found))
    figure = Figure(figsize=(10, 1.4 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row, name in enumerate(names):
            found = differences[name][metric]
            half = 0.0 if math.isnan(found.half) else found.half
            sure = half > 0 and found.excludes_zero
            axes.errorbar(found.mean, row, xerr=half, fmt="o", color="#4878a8" if sure else "#999999", capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(metric, fontsize=10)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(f"{title} (mean, 95 % interval; blue: excludes 0)", fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=110)
