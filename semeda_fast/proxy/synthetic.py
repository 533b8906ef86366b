"""Synthetic label masks: shapes whose borders look like those of annotated data, for any number of classes.

The bundled proxy learns from these alone, so they cover what real masks hold: large flat regions, convex and
star-shaped polygons, ellipses, cells, stripes, thin poles and wires, holes, objects that touch, single
pixels, and void as rims along objects (as in Pascal VOC) or as whole areas.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from semeda_fast.errors import missing_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CLASSES = 256
MAX_CLASSES_PER_MASK = 12  # more would leave too few pixels for each in a training crop


def synthetic_mask(
    num_classes: int,
    size: tuple[int, int] = (128, 128),
    *,
    rng: np.random.Generator,
    ignore_index: int | None = -100,
) -> NDArray[np.int16]:
    """Draw one label mask.

    Each mask takes 2 to 12 random classes of `num_classes` (the only one if there is one), so that over many
    masks each pair of classes comes to touch. About half of the masks hold void pixels.

    Args:
        num_classes: C, 1 to 256.
        size: (H, W) in pixels, each at least 1.
        rng: the source of all randomness; it advances.
        ignore_index: the label of void pixels; None draws no void. Inside [0, C) it takes that class's place:
            the class is then only drawn as void.

    Returns:
        [H, W] int16, each value in [0, C) or equal to `ignore_index`.

    Raises:
        ValueError: `num_classes`, `size` or `ignore_index` is out of range.
        ImportError: Pillow is missing.
    """
    height, width = _checked(num_classes, size, ignore_index)
    labels = np.array([c for c in range(num_classes) if c != ignore_index])
    count = min(len(labels), int(rng.integers(2, MAX_CLASSES_PER_MASK + 1)))
    classes = rng.choice(labels, size=count, replace=False)

    canvas = _Canvas(_background(classes, height, width, rng), rng)
    # The share of the objects that get a void rim.
    rim_share = 0.0 if ignore_index is None else float(rng.choice([0.0, 0.3, 1.0], p=[0.6, 0.25, 0.15]))
    palette = rng.permutation(classes)
    style = rng.random(len(_OBJECTS)) ** 2 + 1e-3  # each mask has its own mix of objects
    style /= style.sum()
    for kind in rng.choice(len(_OBJECTS), size=int(rng.integers(1, 20)), p=style):
        rim = int(rng.integers(1, 4)) if rng.random() < rim_share else 0
        _OBJECTS[kind](canvas, palette, rim, rng)

    mask: NDArray[np.int16] = canvas.labels().astype(np.int16)
    if rng.random() < 0.25:
        _scatter(mask, classes, rng)
    if ignore_index is not None:
        if rng.random() < 0.2:
            canvas.void_area(rng)
        void = canvas.void()
        if rng.random() < 0.08:
            void |= _class_rims(mask, classes, rng)
        mask[void] = ignore_index
    return mask


class SyntheticMasks(Dataset[torch.Tensor]):
    """`length` synthetic masks as a Dataset; item i depends on (`seed`, i) alone.

    So workers, processes and runs that ask for the same item get the same mask, in whatever order. Items are
    drawn when asked for and are not kept.

    Args:
        length: how many items, at least 0.
        num_classes: C, 1 to 256.
        size: (H, W) of each mask in pixels.
        seed: at least 0.
        ignore_index: the label of void pixels; None draws no void.

    Items: [H, W] int64 tensors. Raises as `synthetic_mask`, at construction.
    """

    def __init__(
        self,
        length: int,
        num_classes: int,
        size: tuple[int, int],
        *,
        seed: int = 0,
        ignore_index: int | None = -100,
    ) -> None:
        if length < 0:
            raise ValueError(f"length: expected 0 or more, got {length}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.size = _checked(num_classes, size, ignore_index)
        self.length, self.num_classes = length, num_classes
        self.seed, self.ignore_index = seed, ignore_index

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        position = index + self.length if index < 0 else index
        if not 0 <= position < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} synthetic masks")
        rng = np.random.default_rng([self.seed, position])
        mask = synthetic_mask(self.num_classes, self.size, rng=rng, ignore_index=self.ignore_index)
        return torch.from_numpy(mask.astype(np.int64))


def _checked(num_classes: int, size: tuple[int, int], ignore_index: int | None) -> tuple[int, int]:
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes: expected 1 to {MAX_CLASSES}, got {num_classes}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width), each at least 1 pixel, got {tuple(size)}")
    if ignore_index is not None and not -(2**15) <= ignore_index < 2**15:
        raise ValueError(f"ignore_index: expected a 16-bit integer or None, got {ignore_index}")
    if num_classes == 1 and ignore_index == 0:
        raise ValueError("ignore_index=0 with num_classes=1 leaves no class to draw; choose another ignore_index")
    return int(size[0]), int(size[1])


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise missing_extra("drawing synthetic masks", "Pillow", "train") from None
    return Image, ImageDraw


# ----------------------------------------------------------------------------------------------------
# Backgrounds: a label for each pixel


def _background(classes: NDArray[Any], height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    kind = rng.choice(5, p=[0.3, 0.26, 0.12, 0.16, 0.16])
    if kind == 0 or len(classes) == 1:
        return np.full((height, width), classes[0], np.uint8)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    if kind == 1:
        index = _voronoi(y, x, rng)
    elif kind == 2:
        index = _stripes(y, x, rng)
    elif kind == 3:
        index = _layers(y, x, rng)
    else:  # the largest of several smooth random fields: rounded regions of all sizes
        index = np.argmax([_smooth_noise(height, width, rng) for _ in range(int(rng.integers(2, 5)))], axis=0)
    lookup = rng.choice(classes, size=int(index.max()) + 1)
    lookup[: len(classes)] = rng.permutation(classes)[: len(lookup)]  # neighbours differ where classes suffice
    return lookup.astype(np.uint8)[index]


def _voronoi(y: NDArray[Any], x: NDArray[Any], rng: np.random.Generator) -> NDArray[np.intp]:
    """[H, W] index of the nearest seed; half of the time the borders are bent, sometimes ragged."""
    height, width = y.size, x.size
    seeds = rng.random((int(rng.integers(2, 25)), 2)) * (height, width)
    rows, columns = y, x
    if rng.random() < 0.5:
        bend = rng.uniform(0.02, 0.15) * min(height, width)
        rows = y + bend * _smooth_noise(height, width, rng)
        columns = x + bend * _smooth_noise(height, width, rng)
    if rng.random() < 0.25:
        rows = rows + rng.normal(0, 1, (height, width)).astype(np.float32)
    best = np.full((height, width), np.inf, np.float32)
    index = np.zeros((height, width), np.intp)
    for i, (row, column) in enumerate(seeds.astype(np.float32)):
        distance = (rows - row) ** 2 + (columns - column) ** 2
        closer = distance < best
        best[closer] = distance[closer]
        index[closer] = i
    return index


def _stripes(y: NDArray[Any], x: NDArray[Any], rng: np.random.Generator) -> NDArray[np.intp]:
    angle = rng.choice([0.0, math.pi / 2, rng.uniform(0, math.pi)])
    period = math.exp(rng.uniform(math.log(2), math.log(max(3, 0.4 * max(y.size, x.size)))))
    position = math.cos(angle) * x + math.sin(angle) * y
    if rng.random() < 0.4:
        position = position + period * 0.5 * np.sin((y - x) * (0.5 / period) + rng.uniform(0, 6)).astype(np.float32)
    index = np.floor((position - position.min()) / period).astype(np.intp)
    return index % int(rng.integers(2, 7))


def _layers(y: NDArray[Any], x: NDArray[Any], rng: np.random.Generator) -> NDArray[np.intp]:
    """Regions above one another with wavy borders, as sky, buildings and road."""
    index = np.zeros((y.size, x.size), np.intp)
    for _ in range(int(rng.integers(1, 5))):
        wave = rng.uniform(0, 0.1) * y.size * np.sin(x * (rng.uniform(1, 12) / x.size) + rng.uniform(0, 6))
        index += y + 0.5 > rng.random() * y.size + wave + rng.uniform(-0.4, 0.4) * x * (y.size / x.size)
    return index


def _smooth_noise(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """[H, W] float32 of about unit size: a coarse random grid, interpolated."""
    image, _ = _pillow()
    cells = int(rng.integers(3, 10))
    grid = image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), image.Resampling.BICUBIC))


# ----------------------------------------------------------------------------------------------------
# Objects


class _Canvas:
    """The labels drawn so far and, on a second plane, which of them are void (later objects cover both)."""

    def __init__(self, background: NDArray[np.uint8], rng: np.random.Generator) -> None:
        image, draw = _pillow()
        self.height, self.width = background.shape
        self._labels = image.fromarray(background)
        self._void = image.new("L", (self.width, self.height), 0)
        self._draw = draw.Draw(self._labels)
        self._draw_void = draw.Draw(self._void)

    def labels(self) -> NDArray[np.uint8]:
        return np.asarray(self._labels)

    def void(self) -> NDArray[np.bool_]:
        return np.asarray(self._void) > 0

    def polygon(self, points: NDArray[Any], label: int, rim: int = 0) -> None:
        """`points`: [n, 2] of (x, y) in pixels; `rim`: width in pixels of the void band along its border."""
        corners = [(float(px), float(py)) for px, py in points]
        self._draw.polygon(corners, fill=int(label))
        self._draw_void.polygon(corners, fill=0)
        if rim:
            self._draw_void.line([*corners, corners[0]], fill=255, width=rim, joint="curve" if rim > 2 else None)

    def line(self, points: NDArray[Any], label: int, width: int, rim: int = 0) -> None:
        corners = [(float(px), float(py)) for px, py in points]
        if rim:
            self._draw_void.line(corners, fill=255, width=width + 2 * rim)
        self._draw.line(corners, fill=int(label), width=width)
        self._draw_void.line(corners, fill=0, width=width)

    def place(self, rng: np.random.Generator, largest: float = 0.4) -> tuple[NDArray[Any], float]:
        """A random centre (x, y) and a radius in pixels, uniform on a log scale."""
        top = max(1.0, largest * max(self.height, self.width))
        radius = math.exp(rng.uniform(math.log(min(2.5, top)), math.log(top)))
        return rng.uniform(-0.05, 1.05, 2) * (self.width, self.height), radius

    def void_area(self, rng: np.random.Generator) -> None:
        centre, radius = self.place(rng, 0.3)
        corners = _ring(rng, int(rng.integers(3, 9)), 0.5) * radius + centre
        self._draw_void.polygon([(float(px), float(py)) for px, py in corners], fill=255)


def _ring(rng: np.random.Generator, corners: int, roughness: float) -> NDArray[np.float64]:
    """[corners, 2] points around the origin by increasing angle, at radii from 1 - `roughness` to 1."""
    angle = (np.arange(corners) + rng.uniform(-0.4, 0.4, corners)) * (2 * math.pi / corners) + rng.uniform(0, 7)
    radius = rng.uniform(1 - roughness, 1, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _squeeze(points: NDArray[Any], rng: np.random.Generator, strongest: float = 4.0) -> NDArray[Any]:
    """Scale one axis down by up to `strongest`, then turn by a random angle."""
    turn = rng.uniform(0, math.pi)
    c, s = math.cos(turn), math.sin(turn)
    return points * (1, 1 / rng.uniform(1, strongest)) @ np.array([[c, s], [-s, c]])


def _convex(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    centre, radius = canvas.place(rng)
    points = _squeeze(_ring(rng, int(rng.integers(3, 8)), 0.0), rng) * radius + centre
    canvas.polygon(points, rng.choice(classes), rim)


def _star(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    centre, radius = canvas.place(rng)
    points = _ring(rng, int(rng.integers(7, 20)), rng.uniform(0.3, 0.9)) * radius + centre
    canvas.polygon(points, rng.choice(classes), rim)


def _ellipse(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    centre, radius = canvas.place(rng)
    canvas.polygon(_squeeze(_circle(), rng) * radius + centre, rng.choice(classes), rim)


def _circle() -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _box(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """An upright rectangle: signs, windows, houses."""
    centre, radius = canvas.place(rng)
    half = radius * rng.uniform(0.2, 1, 2)
    points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half + centre
    canvas.polygon(points, rng.choice(classes), rim)


def _with_holes(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """An object with one to four holes through which other classes show."""
    centre, radius = canvas.place(rng)
    canvas.polygon(_ring(rng, int(rng.integers(5, 12)), 0.3) * radius + centre, classes[0], rim)
    hole = rng.choice(classes)
    for _ in range(int(rng.integers(1, 5))):
        middle = centre + rng.uniform(-0.45, 0.45, 2) * radius
        points = _squeeze(_circle()[::2], rng, 2.0) * (radius * rng.uniform(0.08, 0.35)) + middle
        canvas.polygon(points, hole, rim if rng.random() < 0.5 else 0)


def _touching(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """Slices of one disc, or boxes in a row, each of a class of its own, without a gap between them."""
    centre, radius = canvas.place(rng)
    parts = int(rng.integers(2, 6))
    labels = rng.choice(classes, parts)
    if rng.random() < 0.5:
        ring = _ring(rng, 4 * parts, 0.3) * radius + centre
        for i, label in enumerate(labels):
            arc = ring[np.arange(4 * i, 4 * i + 5) % (4 * parts)]
            canvas.polygon(np.concatenate([arc, centre[None]]), label, rim)
        return
    left = centre[0] - radius
    for label in labels:
        right = left + radius * rng.uniform(0.2, 1)
        top, bottom = centre[1] - radius * rng.uniform(0.1, 1), centre[1] + radius * rng.uniform(0.1, 1)
        canvas.polygon(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]), label, rim)
        left = right


def _pole(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """A straight line, 1 to 3 pixels wide, mostly upright or level."""
    start, length = canvas.place(rng, 1.0)
    tilt = rng.choice([0.0, math.pi / 2, rng.uniform(0, math.pi)]) + rng.normal(0, 0.05)
    step = np.array([math.cos(tilt), math.sin(tilt)]) * length
    canvas.line(np.stack([start, start + step]), rng.choice(classes), int(rng.integers(1, 4)), min(rim, 2))


def _wire(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """A curve, 1 to 3 pixels wide: a random walk with slowly changing direction."""
    start, length = canvas.place(rng, 1.2)
    steps = 24
    turn = rng.uniform(0, 7) + np.cumsum(rng.normal(0, rng.uniform(0.02, 0.5), steps))
    path = np.stack([np.cos(turn), np.sin(turn)], axis=1).cumsum(axis=0) * (length / steps) + start
    canvas.line(path, rng.choice(classes), int(rng.integers(1, 4)), min(rim, 2))


def _fence(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """Thin parallel bars with gaps of a few pixels."""
    centre, radius = canvas.place(rng)
    width, gap = int(rng.integers(1, 4)), int(rng.integers(1, 7))
    label, upright = rng.choice(classes), rng.random() < 0.7
    for i in range(min(12, 1 + int(2 * radius / (width + gap)))):
        offset = i * (width + gap) - radius
        ends = np.array([(offset, -radius), (offset, radius)])
        canvas.line((ends if upright else ends[:, ::-1]) + centre, label, width)


def _blobs(canvas: _Canvas, classes: NDArray[Any], rim: int, rng: np.random.Generator) -> None:
    """A few spots of 1 to about 5 pixels across."""
    label = rng.choice(classes)
    middle, spread = canvas.place(rng, 0.5)
    for _ in range(int(rng.integers(1, 12))):
        centre = middle + rng.normal(0, spread, 2)
        canvas.polygon(_ring(rng, 6, 0.6) * rng.uniform(0.3, 2.8) + centre, label)


_OBJECTS = (_convex, _star, _ellipse, _box, _with_holes, _touching, _pole, _wire, _fence, _blobs)


# ----------------------------------------------------------------------------------------------------
# Last touches


def _scatter(mask: NDArray[np.int16], classes: NDArray[Any], rng: np.random.Generator) -> None:
    """Set single pixels (up to one in a hundred) to random classes, in place."""
    count = 1 + int(mask.size * 10 ** rng.uniform(-4, -2))
    mask.reshape(-1)[rng.integers(0, mask.size, count)] = rng.choice(classes, count)


def _class_rims(mask: NDArray[np.int16], classes: NDArray[Any], rng: np.random.Generator) -> NDArray[np.bool_]:
    """[H, W] bool, True within 1 or 2 pixels of every border of one class or of half of the classes."""
    some = classes[: max(1, len(classes) // 2)] if rng.random() < 0.5 else classes[:1]
    inside = np.isin(mask, some)
    rim = np.zeros(mask.shape, np.bool_)
    for reach in range(1, int(rng.integers(1, 3)) + 1):
        for axis in (0, 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(reach, None), slice(None, -reach)
            differs = inside[tuple(ahead)] != inside[tuple(behind)]
            rim[tuple(ahead)] |= differs
            rim[tuple(behind)] |= differs
    return rim
