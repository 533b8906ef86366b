"""The picture of `semeda-fast inspect`: where and how strongly the loss sees a damaged prediction."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .advice import ARRAY, advice_on
from .errors import missing_extra
from .files import atomic_path
from .functional import semeda_loss
from .proxy.edges import edge_labels
from .proxy.network import EdgeProxy
from .proxy.quality import one_hot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ELEMENTS = 2**27  # C * H * W; a larger mask is cut to its centre, so that it fits into memory
THIN = 3  # pixels: what an opening by a square of 2 * THIN + 1 removes counts as thin
SURE = 0.99  # what the damaged prediction gives to right labels; the rest is spread over all classes
DOUBT = 0.3  # of that, what it gives to the right label where it is wrong: networks are unsure there

# Twelve colours chosen so that any two, and the grey of void, stay a CIELAB distance of 21 or more apart in
# normal vision and in simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009).
PALETTE = (
    "#0077BB", "#EEDD88", "#AA3377", "#88CCEE", "#E69F00", "#332288",
    "#EE6677", "#663333", "#8400CD", "#CC3311", "#FFFFFF", "#000000",
)  # fmt: skip
VOID_GREY = "#B8B8B8"


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    Attributes:
        name: what was done, for a legend.
        pixels: [H,W] bool, the valid pixels whose predicted label is wrong because of it.
        share_of_area, share_of_semeda, share_of_gradient: what the pixels hold that see it, each of 1.
            A pixel sees it if a damaged pixel lies in the proxy's receptive field around it.
    """

    name: str
    pixels: np.ndarray
    share_of_area: float = 0.0
    share_of_semeda: float = 0.0
    share_of_gradient: float = 0.0


@dataclass(frozen=True)
class Inspection:
    """What the picture shows; all maps [H,W].

    Attributes:
        labels: int64, the mask. valid: bool, False at void pixels.
        edges: bool, the edge labels. radius: their radius in pixels.
        edge_probability: float32, the proxy's, of the mask itself.
        edge_f1: of edge_probability > 0.5; NaN without any edge.
        predicted: int64, the damaged prediction's labels. damages: what was done to it.
        semeda: float32, the SEMEDA term per pixel (lambda_semeda = 1); its mean is the loss.
        gradient: float32, L2 norm over classes of d(sum of `semeda`) / d(logits).
        cropped_from: the mask's size where only its centre was used.
    """

    labels: np.ndarray
    valid: np.ndarray
    edges: np.ndarray
    radius: int
    edge_probability: np.ndarray
    edge_f1: float
    predicted: np.ndarray
    damages: tuple[Damage, ...]
    semeda: np.ndarray
    gradient: np.ndarray
    proxy: EdgeProxy
    cropped_from: tuple[int, int] | None = None

    @property
    def mean_semeda(self) -> float:
        """The SEMEDA term of the damaged prediction, as reduction="mean" gives it with lambda_semeda = 1."""
        return float(self.semeda[self.valid].mean()) if self.valid.any() else 0.0


def inspect_mask(labels: np.ndarray, proxy: EdgeProxy, *, ignore_index: int = -100) -> Inspection:
    """Damage a mask in a fixed way and look at the loss's answer.

    Args:
        labels: [H,W] integers, each a class of `proxy` or `ignore_index`.
        proxy: on the CPU.
        ignore_index: the void label.

    Returns:
        the maps of the picture; the same for the same mask, no random numbers are drawn.

    Raises:
        ValueError: not [H,W], empty, or a label that is no class of `proxy`.
    """
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(f"expected a mask [H,W] with at least one pixel, got shape {labels.shape}")
    target = torch.as_tensor(np.ascontiguousarray(labels).astype(np.int64))
    target, cropped_from = _crop(target, proxy.num_classes)
    valid = target != ignore_index
    if valid.any():
        low, high = (int(x) for x in target[valid].aminmax())
        if low < 0 or high >= proxy.num_classes:
            raise ValueError(
                f"the mask holds labels from {low} to {high}, the proxy has {proxy.num_classes} classes "
                f"and ignore_index is {ignore_index}. {advice_on(target, proxy.num_classes, ignore_index, ARRAY)}."
            )
    radius = int(proxy.provenance.get("edge_radius", 1))
    edges = edge_labels(target, radius=radius, ignore_index=ignore_index)
    probability = _edge_probability(proxy, one_hot(target[None], valid[None], proxy.num_classes))

    predicted, damages = damaged_labels(target.where(valid, 0), valid, proxy.num_classes)
    logits = _soften(predicted, target.where(valid, predicted), proxy.num_classes).requires_grad_()
    semeda = semeda_loss(
        logits,
        target[None],
        proxy,
        lambda_ce=0.0,
        lambda_semeda=1.0,
        ignore_index=ignore_index,
        reduction="none",
    )
    assert isinstance(semeda, Tensor)
    (d_logits,) = torch.autograd.grad(semeda.sum(), logits)
    semeda_map = semeda.detach()[0].float()
    gradient = d_logits[0].float().norm(dim=0)
    return Inspection(
        labels=target.numpy(),
        valid=valid.numpy(),
        edges=edges.numpy(),
        radius=radius,
        edge_probability=probability.numpy(),
        edge_f1=_f1(probability[valid] > 0.5, edges[valid]),
        predicted=predicted.numpy(),
        damages=tuple(_shares(damage, valid, semeda_map, gradient, proxy) for damage in damages),
        semeda=semeda_map.numpy(),
        gradient=gradient.numpy(),
        proxy=proxy,
        cropped_from=cropped_from,
    )


def damaged_labels(labels: Tensor, valid: Tensor, num_classes: int) -> tuple[Tensor, list[Damage]]:
    """A prediction with known mistakes: labels [H,W] int64, valid [H,W] bool -> labels [H,W], what was done.

    The left half is shifted right and down by about 0.6 % of the diagonal. In the right half the class with
    the thinnest structures is painted over by its neighbours, and a disk of another class is set into an
    even region. Small masks take what fits.
    """
    height, width = labels.shape
    half = width // 2
    right = torch.zeros_like(valid)
    right[:, half:] = True
    out = labels.clone()

    shift = max(1, round(0.006 * (height**2 + width**2) ** 0.5))
    moved = labels.roll((shift, shift), (0, 1))
    source = valid.roll((shift, shift), (0, 1))
    source[:shift] = source[:, :shift] = False  # rolled in from the other side
    out = torch.where(source & ~right, moved, out)
    damages = [Damage(f"left half shifted {shift} px down and right", (valid & (out != labels)).numpy())]

    thin = _thinnest_class(labels, valid, valid & right)
    if thin is not None:
        out = torch.where(right & valid, _fill(out, right & valid & (labels == thin), valid), out)
        pixels = valid & right & (out != labels)
        damages.append(Damage(f"class {thin} removed from the right half", pixels.numpy()))

    depth = _depth(labels, valid & right & (out == labels))
    size = min(max(2, round(0.04 * min(height, width))), int(depth.max()) - 1)
    if size >= 2:
        yy, xx = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        away = ((yy - height // 2) ** 2 + (xx - (half + width) // 2) ** 2).where(depth > size, 2**62)
        y, x = divmod(int(away.argmin()), width)
        disk = (yy - y) ** 2 + (xx - x) ** 2 <= size**2
        counts = torch.bincount(labels[valid & (labels != labels[y, x])])
        other = int(counts.argmax()) if counts.numel() else (int(labels[y, x]) + 1) % num_classes
        out = torch.where(disk, other, out)
        damages.append(Damage(f"disk of class {other} added", (valid & disk & (out != labels)).numpy()))
    return out, [damage for damage in damages if damage.pixels.any()]


def draw(inspection: Inspection, path: str | os.PathLike[str], *, title: str = "", overwrite: bool = False) -> None:
    """Draw the six panels into a picture file; its suffix chooses the format (png, pdf, svg, ...).

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: matplotlib does not know the suffix.
        OSError: the path exists and overwrite is False, or cannot be written to.
    """
    check_suffix(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(inspection, title)
    FigureCanvasAgg(figure)
    with atomic_path(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=150)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """ValueError unless matplotlib can write such a picture; MissingExtraError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "matplotlib":
            raise
        raise missing_extra("semeda-fast inspect", "matplotlib", "plot") from None
    known = Figure().canvas.get_supported_filetypes()
    suffix = os.path.splitext(path)[1].lower()
    if suffix.lstrip(".") not in known:
        raise ValueError(
            f"cannot draw a picture of type {suffix or '(none)'!r}: {path} should end in .png, .pdf or .svg"
        )


def _figure(inspection: Inspection, title: str) -> Figure:
    from matplotlib.figure import Figure

    height, width = inspection.labels.shape
    panel = 5.2  # inches
    tall = min(max(panel * height / width, 0.35 * panel), 1.4 * panel)
    figure = Figure(figsize=(3 * (panel + 0.6), 2 * tall + 2.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    proxy, void = inspection.proxy, ~inspection.valid
    chain = " → ".join(str(c) for c in (proxy.num_classes, *proxy.widths, proxy.edge_classes))
    head = f"proxy {chain}, tap {proxy.tap}, distance {proxy.distance}"
    if inspection.cropped_from:
        head += f"; centre {width} x {height} of {inspection.cropped_from[1]} x {inspection.cropped_from[0]} px"
    figure.suptitle(f"{title}\n{head}" if title else head, fontsize=14)

    _draw_labels(grid[0, 0], inspection.labels, void, proxy.num_classes)
    grid[0, 0].set_title(f"Mask, {width} x {height} px ({void.mean():.1%} void, grey)")
    _draw_map(grid[0, 1], inspection.edges.astype(np.float32), void, "", 1.0, ("no edge", "edge"))
    grid[0, 1].set_title(f"Edge labels: another label within {inspection.radius} px")
    _draw_map(grid[0, 2], inspection.edge_probability, void, "probability", 1.0)
    grid[0, 2].set_title(f"Proxy's edge probability (edge F1 {inspection.edge_f1:.3f})")

    _draw_labels(grid[1, 0], inspection.predicted, void, proxy.num_classes)
    grid[1, 0].set_title("Damaged prediction (outlines: wrong pixels)")
    _outline(grid[1, 0], inspection)
    _draw_map(grid[1, 1], inspection.semeda, void, "loss per pixel (no unit)", None)
    grid[1, 1].set_title(f"SEMEDA term per pixel, λ = 1 (mean {inspection.mean_semeda:.3f})")
    _draw_map(grid[1, 2], inspection.gradient, void, "loss per unit of logit", None)
    grid[1, 2].set_title("Gradient of its sum, L2 norm over the logits of a pixel")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    note = (
        f"The prediction is {SURE:.0%} sure of right labels; where it is wrong, wrong and right label "
        f"share that {1 - DOUBT:.0%} to {DOUBT:.0%}; then it is softened over 2 px."
    )
    figure.supxlabel(f"{report(inspection)}\n\n{note}", fontsize=12, family="monospace", x=0.02, ha="left")
    return figure


def report(inspection: Inspection) -> str:
    """A table as text: what each damage takes of the image, of the SEMEDA term and of the gradient."""
    reach = inspection.proxy.receptive_field // 2
    names = [f"{letter}  {damage.name}" for letter, damage in zip("ABC", inspection.damages, strict=False)]
    head = f"damage, and pixels within {reach} px of it"
    if not names:
        return "the mask leaves no room for damage"
    wide = max(len(text) for text in (head, *names))
    lines = [f"{head:<{wide}}  of image  of SEMEDA term  of gradient"]
    for name, damage in zip(names, inspection.damages, strict=True):
        shares = damage.share_of_area, damage.share_of_semeda, damage.share_of_gradient
        lines.append("{:<{}}  {:8.1%}  {:14.1%}  {:11.1%}".format(name, wide, *shares))
    return "\n".join(lines)


def _draw_labels(axes: Axes, labels: np.ndarray, void: np.ndarray, num_classes: int) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = _colours(num_classes)
    cmap = ListedColormap(colours).with_extremes(bad=VOID_GREY)
    norm = BoundaryNorm(np.arange(num_classes + 1) - 0.5, num_classes)
    image = axes.imshow(np.ma.array(labels, mask=void), cmap=cmap, norm=norm, interpolation="nearest")
    step = -(-num_classes // 24)
    bar = axes.figure.colorbar(image, cax=_beside(axes), ticks=range(0, num_classes, step))
    bar.set_label("class")
    bar.ax.tick_params(length=0)
    depth = _depth(torch.as_tensor(np.where(void, -1, labels)), torch.ones(labels.shape, dtype=torch.bool))
    room = 0.025 * max(labels.shape)  # half the height of a number
    for number in np.unique(labels[~void]):
        inside = depth.where(torch.as_tensor((labels == number) & ~void), 0)
        y, x = divmod(int(inside.argmax()), labels.shape[1])
        if inside[y, x] > room:
            red, green, blue = colours[number][:3]
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            colour = "black" if light else "white"
            axes.text(x, y, str(number), color=colour, ha="center", va="center", fontsize=11)


def _colours(num_classes: int) -> list[tuple[float, ...]]:
    """One colour a class; beyond the palette steps of cividis, neighbouring classes far apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if num_classes <= len(PALETTE):
        return [to_rgb(colour) for colour in PALETTE[:num_classes]]
    golden = 0.6180339887498949
    return [tuple(float(v) for v in colormaps["cividis"]((k * golden) % 1.0)) for k in range(num_classes)]


def _draw_map(
    axes: Axes,
    values: np.ndarray,
    void: np.ndarray,
    unit: str,
    top: float | None,
    names: tuple[str, ...] = (),
) -> None:
    """A map from 0 to `top` (None: nearly its maximum) with a colour bar; `names` makes steps of it."""
    from matplotlib import colormaps

    cmap = colormaps["cividis"].with_extremes(bad=VOID_GREY)
    extend = "neither"
    if top is None:
        shown = values[~void]
        top = float(np.quantile(shown, 0.998)) if shown.size else 0.0  # a few peaks would darken all the rest
        extend = "max" if shown.size and shown.max() > top > 0 else "neither"
    if names:
        cmap = cmap.resampled(len(names))
    shown = np.ma.array(values, mask=void)
    image = axes.imshow(shown, cmap=cmap, vmin=0.0, vmax=top or 1.0, interpolation="auto")
    bar = axes.figure.colorbar(image, cax=_beside(axes), extend=extend)
    bar.set_label(unit)
    if names:
        bar.set_ticks([top * (k + 0.5) / len(names) for k in range(len(names))], labels=list(names))
        bar.ax.tick_params(length=0)


def _beside(axes: Axes) -> Axes:
    """Room for a colour bar as tall as the picture."""
    return axes.inset_axes((1.02, 0.0, 0.035, 1.0))


def _outline(axes: Axes, inspection: Inspection) -> None:
    """A line around the wrong pixels, and the letter of the damage beside its largest part."""
    height, width = inspection.labels.shape
    wrong = np.zeros((height + 2, width + 2))
    for damage in inspection.damages:
        wrong[1:-1, 1:-1] += damage.pixels
    if wrong.any() and min(height, width) > 1:
        axes.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), wrong, [0.5], colors="black", linewidths=0.7)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
    for letter, damage in zip("ABC", inspection.damages, strict=False):
        y, x = _densest(damage.pixels)
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black", "linewidth": 0.8}
        offset = (0, 20) if y > 0.15 * height else (0, -20)
        arrow = {"arrowstyle": "-", "color": "black", "linewidth": 0.8}
        axes.annotate(
            letter,
            (x, y),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            bbox=box,
            arrowprops=arrow,
        )


def _densest(pixels: np.ndarray) -> tuple[int, int]:
    """The marked pixel with the most marked pixels around it."""
    marked = torch.as_tensor(pixels, dtype=torch.float32)[None, None]
    side = max(1, min(pixels.shape) // 24) * 2 + 1
    density = F.avg_pool2d(marked, side, stride=1, padding=side // 2) * marked
    y, x = divmod(int(density.argmax()), pixels.shape[1])
    return y, x


def _crop(target: Tensor, num_classes: int) -> tuple[Tensor, tuple[int, int] | None]:
    height, width = target.shape
    scale = (MAX_ELEMENTS / (num_classes * height * width)) ** 0.5
    if scale >= 1:
        return target, None
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    top, left = (height - h) // 2, (width - w) // 2
    return target[top : top + h, left : left + w].contiguous(), (height, width)


def _soften(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Logits [1,C,H,W] as of a network: unsure within two pixels of label edges and where it is wrong."""
    everywhere = torch.ones_like(truth[None], dtype=torch.bool)
    right, chosen = (one_hot(labels[None], everywhere, num_classes) for labels in (truth, predicted))
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float32) / 16
    kernel = (row[:, None] * row).expand(num_classes, 1, 5, 5)
    mixed = F.pad(DOUBT * right + (1 - DOUBT) * chosen, (2, 2, 2, 2), mode="replicate")
    return (SURE * F.conv2d(mixed, kernel, groups=num_classes) + (1 - SURE) / num_classes).log()


def _edge_probability(proxy: EdgeProxy, probs: Tensor) -> Tensor:
    """Edge probability [H,W]: the last of the edge classes, or the sigmoid of a single one."""
    with torch.no_grad():
        logits = proxy.edge_logits(probs)
    probability = logits.sigmoid() if proxy.edge_classes == 1 else logits.softmax(1)[:, -1:]
    if probability.shape[-2:] != probs.shape[-2:]:  # a proxy with a stride or a pooling
        probability = F.interpolate(probability, size=probs.shape[-2:], mode="nearest")
    return probability[0, 0]


def _f1(predicted: Tensor, expected: Tensor) -> float:
    both, total = int((predicted & expected).sum()), int(predicted.sum() + expected.sum())
    return 2 * both / total if total else math.nan  # no edge, and none predicted


def _shares(damage: Damage, valid: Tensor, semeda: Tensor, gradient: Tensor, proxy: EdgeProxy) -> Damage:
    seen = _dilate(torch.as_tensor(damage.pixels), proxy.receptive_field // 2) & valid
    shares = []
    for amount in (valid.float(), semeda, gradient):
        total = float(amount.sum(dtype=torch.float64))
        shares.append(float(amount[seen].sum(dtype=torch.float64)) / total if total else 0.0)
    return Damage(damage.name, damage.pixels, *shares)


def _dilate(mask: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    return F.max_pool2d(mask.float()[None, None], side, stride=1, padding=radius)[0, 0] > 0


def _depth(labels: Tensor, where: Tensor, most: int = 64) -> Tensor:
    """Chessboard distance [H,W] to the nearest other label, the image's frame, or out of `where`; capped."""
    padded = F.pad(torch.where(where, labels.double(), -2.0)[None, None], (1, 1, 1, 1), value=-2.0)
    same = F.max_pool2d(padded, 3, stride=1) == -F.max_pool2d(-padded, 3, stride=1)
    inner = (same[0, 0] & where).float()
    depth = where.to(torch.int64)
    for _ in range(most):
        if not inner.any():
            break
        depth += inner.to(torch.int64)
        outside = F.pad(1 - inner[None, None], (1, 1, 1, 1), value=1.0)
        inner = 1 - F.max_pool2d(outside, 3, stride=1)[0, 0]
    return depth


def _thinnest_class(labels: Tensor, valid: Tensor, where: Tensor) -> int | None:
    """The class of which an opening takes the largest part within `where`; among equals the larger one.

    Classes of fewer than 20 pixels, the largest class, and classes that mostly survive do not count.
    """
    counts = torch.bincount(labels[where], minlength=1)
    best: tuple[float, int, int | None] = (0.25, 0, None)
    for number in counts.nonzero().flatten().tolist():
        count = int(counts[number])
        if count < 20 or number == int(counts.argmax()):
            continue
        mask = (labels == number) & valid  # all of it: cut at the edge of `where`, broad objects would look thin
        kept = _dilate(~_dilate(~mask, THIN), THIN) & mask & where
        best = max(best, (1 - int(kept.sum()) / count, count, number), key=lambda entry: entry[:2])
    return best[2]


def _fill(labels: Tensor, hole: Tensor, valid: Tensor) -> Tensor:
    """Labels with the hole filled from its rim inwards (the largest label of the 8 neighbours wins)."""
    out = torch.where(hole | ~valid, -1, labels).float()
    while True:
        left = hole & (out < 0)
        grown = F.max_pool2d(out[None, None], 3, stride=1, padding=1)[0, 0]
        if not (left & (grown >= 0)).any():
            break
        out = torch.where(left, grown, out)
    return torch.where(hole & (out >= 0), out.to(labels.dtype), labels)
