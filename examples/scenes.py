"""Synthetic street scenes with label masks: data to try a training on, with nothing to download.

    python examples/scenes.py OUT --train 200 --val 50

writes OUT/train/images/*.png, OUT/train/masks/*.png (palette PNGs: label indices, 255 for void),
OUT/val/images and OUT/val/masks. A small network learns the large regions within a minute. Borders and thin
objects stay hard: the colours of the classes overlap and change from scene to scene, and everything is
shaded, textured, blurred and noisy.

Needs NumPy and Pillow.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from semeda_fast.files import atomic_path

CLASS_NAMES = ("road", "sky", "building", "pole", "tree", "car", "person", "sign")
IGNORE_INDEX = 255
ROAD, SKY, BUILDING, POLE, TREE, CAR, PERSON, SIGN = range(8)

# Colours of the classes in the masks' palette, close to those of Cityscapes.
_PALETTE = {
    ROAD: (128, 64, 128),
    SKY: (70, 130, 180),
    BUILDING: (70, 70, 70),
    POLE: (190, 153, 153),
    TREE: (107, 142, 35),
    CAR: (0, 0, 142),
    PERSON: (220, 20, 60),
    SIGN: (220, 220, 0),
    IGNORE_INDEX: (255, 255, 255),
}

Colour = Any  # [3] float, RGB from 0 to 255
Region = Any  # [H, W] bool


def make_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: (H, W) in pixels, each at least 32.
        rng: the source of all randomness; it advances.

    Returns:
        image: [H, W, 3] uint8 RGB; mask: [H, W] uint8, labels 0 to 7, or 255 in a band along some objects.
    """
    if min(size) < 32:
        raise ValueError(f"size: expected (height, width) of at least 32 pixels each, got {size}")
    scene = _Scene(size, rng)
    _sky_and_road(scene)
    _buildings(scene)
    kinds: list[tuple[Callable[[_Scene, float], None], int, int]]
    kinds = [(_tree, 0, 4), (_pole, 1, 5), (_car, 1, 5), (_person, 0, 6)]  # at least, at most
    objects = [
        (float(rng.beta(1.2, 1.8)), kind)
        for kind, least, most in kinds
        for _ in range(int(rng.integers(least, most + 1)))
    ]
    for near, draw in sorted(objects, key=lambda item: item[0]):  # the farthest first
        draw(scene, near)
    return scene.finish()


def write_scenes(
    folder: str | Path,
    *,
    train: int = 200,
    val: int = 50,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write `train` and `val` scenes of `size` (H, W) into train/ and val/ of `folder`.

    Scene i of a split depends on (`seed`, split, i) alone. With `overwrite`, scenes from an earlier call go
    first, so that none is left over; other files stay.

    Raises:
        FileExistsError: `folder` holds something and `overwrite` is False.
        NotADirectoryError: `folder` is a file.
        ValueError: a count is negative, or the size too small.
    """
    folder = Path(folder)
    if train < 0 or val < 0:
        raise ValueError(f"train and val: expected 0 or more scenes, got {train} and {val}")
    if min(size) < 32:
        raise ValueError(f"size: expected (height, width) of at least 32 pixels each, got {size}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder to write scenes into")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; pass overwrite=True (--overwrite) or choose another folder")
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        for part in ("images", "masks"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
            for old in (folder / name / part).glob("scene_[0-9][0-9][0-9][0-9][0-9].png"):
                old.unlink()
        for i in range(count):
            image, mask = make_scene(size, np.random.default_rng([seed, split, i]))
            with atomic_path(folder / name / "images" / f"scene_{i:05d}.png", overwrite=overwrite) as path:
                Image.fromarray(image).save(path)
            with atomic_path(folder / name / "masks" / f"scene_{i:05d}.png", overwrite=overwrite) as path:
                _with_palette(mask).save(path)


def _with_palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask)
    colours = [_PALETTE.get(label, (0, 0, 0)) for label in range(256)]
    image.putpalette([channel for colour in colours for channel in colour])  # makes it mode P
    return image


# ----------------------------------------------------------------------------------------------------
# The canvas


class _Scene:
    """What is drawn so far: colours, labels, and which pixels are void. Later objects cover earlier ones."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.height, self.width = size
        self.rng = rng
        self.colour = np.zeros((*size, 3), np.float32)
        self.labels = np.zeros(size, np.uint8)
        self.void = np.zeros(size, np.bool_)
        self.horizon = self.height * rng.uniform(0.38, 0.6)
        self.light = rng.normal(0, 14, 3)  # each scene has a colour cast of its own
        self.rims = rng.random() < 0.6  # as with real annotators: some leave rims, some do not
        self.coarse = self.noise(8)
        self.fine = self.noise(2)

    def noise(self, cell: int) -> np.ndarray:
        """[H, W] float32 of about unit size that changes over about `cell` pixels."""
        shape = (self.height // cell + 2, self.width // cell + 2)
        grid = Image.fromarray(self.rng.normal(0, 1, shape).astype(np.float32))
        return np.asarray(grid.resize((self.width, self.height), Image.Resampling.BICUBIC))

    def base_y(self, near: float) -> float:
        """Where an object at `near` (0 at the horizon, 1 at the camera) stands on the road, in pixels."""
        return self.horizon + (self.height * 1.02 - self.horizon) * (0.08 + 0.92 * near)

    def polygon(self, points: Any) -> Region:
        image = Image.new("L", (self.width, self.height), 0)
        ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=1)
        return np.asarray(image) > 0

    def lines(self, paths: Any, width: int) -> Region:
        image = Image.new("L", (self.width, self.height), 0)
        for path in paths:
            ImageDraw.Draw(image).line([(float(x), float(y)) for x, y in path], fill=1, width=width)
        return np.asarray(image) > 0

    def ellipses(self, boxes: Any) -> Region:
        image = Image.new("L", (self.width, self.height), 0)
        for box in boxes:
            ImageDraw.Draw(image).ellipse(box, fill=1)
        return np.asarray(image) > 0

    def box(self, left: float, top: float, right: float, bottom: float) -> Region:
        return self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)])

    def paint(self, region: Region, colour: Colour, texture: np.ndarray | None = None) -> None:
        """Colour a region without changing its label: windows, road marks, shadows."""
        self.colour[region] = colour
        if texture is not None:
            self.colour[region] += texture[region][:, None]

    def add(
        self, label: int, region: Region, colour: Colour, texture: np.ndarray | None = None, rim: float = 0.0
    ) -> None:
        """Add an object; `rim` is the chance that a void band of 1 to 3 pixels lies along its border."""
        self.paint(region, colour, texture)
        self.labels[region] = label
        self.void[region] = False
        if self.rims and self.rng.random() < rim:
            image = Image.fromarray(region.astype(np.uint8))
            reach = 5 if self.rng.random() < 0.2 else 3
            outside = np.asarray(image.filter(ImageFilter.MaxFilter(reach)))
            inside = np.asarray(image.filter(ImageFilter.MinFilter(3)))
            if 2 * np.count_nonzero(inside) < np.count_nonzero(region):  # too thin to lose its border pixels
                inside = region
            self.void |= outside != inside

    def tint(self, *colours: tuple[float, float, float], spread: float = 18.0) -> Colour:
        """One of `colours`, changed a little and by the scene's light."""
        return np.array(colours[int(self.rng.integers(len(colours)))]) + self.rng.normal(0, spread, 3) + self.light

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.width, dtype=np.float32)[None, :]
        light = 1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.1, 0.1) * y + 0.05 * self.noise(24)
        shaded = np.clip(self.colour * light[..., None], 0, 255).astype(np.uint8)
        blurred = Image.fromarray(shaded).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
        pixels = np.asarray(blurred).astype(np.float32) * rng.uniform(0.75, 1.1)
        pixels += rng.normal(0, rng.uniform(3, 9), pixels.shape)
        image = np.clip(pixels, 0, 255).astype(np.uint8)
        return image, np.where(self.void, np.uint8(IGNORE_INDEX), self.labels)


# ----------------------------------------------------------------------------------------------------
# What stands in a street


def _sky_and_road(scene: _Scene) -> None:
    rng, y = scene.rng, np.arange(scene.height, dtype=np.float32)[:, None]
    everywhere = np.ones((scene.height, scene.width), np.bool_)
    clouds = np.maximum(0, scene.noise(20) + 0.6 * scene.noise(7)) * rng.uniform(0, 30)
    blue = scene.tint((120, 160, 215), (185, 195, 205), (200, 180, 165))
    scene.add(SKY, everywhere, blue, clouds + 25 * y / scene.height)

    slope, x = rng.uniform(-0.04, 0.04), np.arange(scene.width, dtype=np.float32)[None, :]
    road = y > scene.horizon + slope * (x - scene.width / 2)
    asphalt = scene.tint((105, 103, 105), (135, 128, 120), (85, 88, 95), spread=10)
    scene.add(ROAD, road, asphalt, 4 * scene.coarse + 6 * scene.fine)
    vanish = scene.width * rng.uniform(0.3, 0.7)
    for _ in range(int(rng.integers(0, 4))):  # dashes towards the vanishing point, still road
        foot, wide = scene.width * rng.uniform(-0.5, 1.5), scene.width * rng.uniform(0.01, 0.03)
        white = scene.tint((205, 205, 195))
        for start in np.arange(0.1, 1.0, 0.3):
            ends = np.array([start, start + rng.uniform(0.1, 0.3)]) ** 1.5
            left, top = vanish + (foot - vanish) * ends, scene.horizon + (scene.height - scene.horizon) * ends
            right = left + np.maximum(0.5, wide * ends)
            corners = [(left[0], top[0]), (right[0], top[0]), (right[1], top[1]), (left[1], top[1])]
            scene.paint(scene.polygon(corners) & road, white)


def _buildings(scene: _Scene) -> None:
    rng = scene.rng
    left = -scene.width * rng.uniform(0, 0.2)
    while left < scene.width:
        wide = scene.width * rng.uniform(0.08, 0.4)
        if rng.random() < 0.75:
            _building(scene, left, left + wide)
        left += wide


def _building(scene: _Scene, left: float, right: float) -> None:
    rng = scene.rng
    bottom = scene.horizon + scene.height * rng.uniform(0.0, 0.06)
    top = scene.horizon - scene.height * rng.uniform(0.08, 0.5)
    corners = [(left, bottom), (left, top), (right, top), (right, bottom)]
    if rng.random() < 0.4:  # a gable
        corners.insert(2, ((left + right) / 2, top - (right - left) * rng.uniform(0.1, 0.4)))
    region = scene.polygon(corners)
    wall = scene.tint((150, 120, 100), (120, 115, 115), (185, 175, 155), (165, 105, 85))
    scene.add(BUILDING, region, wall, 4 * scene.coarse + 3 * scene.fine)
    pitch_x, pitch_y = scene.width * rng.uniform(0.04, 0.09), scene.height * rng.uniform(0.06, 0.12)
    glass = scene.tint((70, 80, 95), (150, 170, 200), (205, 200, 170))  # some windows look like sky
    for wx in np.arange(left + 0.3 * pitch_x, right - 0.6 * pitch_x, pitch_x):
        for wy in np.arange(top + 0.4 * pitch_y, bottom - 0.6 * pitch_y, pitch_y):
            window = scene.box(wx, wy, wx + 0.45 * pitch_x, wy + 0.5 * pitch_y)
            scene.paint(window & region, glass, 3 * scene.fine)


def _tree(scene: _Scene, near: float) -> None:
    rng = scene.rng
    foot, x = scene.base_y(0.5 * near), rng.uniform(0, scene.width)
    tall = scene.height * (0.25 + 0.5 * near) * rng.uniform(0.7, 1.2)
    crown, trunk = tall * rng.uniform(0.25, 0.4), max(1.0, 0.05 * tall)
    stem = scene.box(x - trunk, foot - tall + crown, x + trunk, foot)
    scene.add(TREE, stem, scene.tint((95, 75, 60)), 6 * scene.fine)
    centre = np.array([x, foot - tall + crown])
    ragged = np.zeros((scene.height, scene.width), np.bool_)
    for _ in range(int(rng.integers(4, 9))):
        angle = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        radius = crown * rng.uniform(0.4, 0.8) * rng.uniform(0.75, 1.1, 14)
        middle = centre + rng.normal(0, 0.35 * crown, 2)
        ragged |= scene.polygon(middle + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None])
    ragged &= scene.fine + 0.5 * scene.coarse < rng.uniform(1.0, 2.2)  # gaps between the leaves
    leaves = scene.tint((75, 105, 55), (95, 110, 60), (125, 115, 65))
    scene.add(TREE, ragged, leaves, 18 * scene.noise(3) + 10 * scene.coarse, rim=0.3)


def _pole(scene: _Scene, near: float) -> None:
    """A pole, 1 to 2 pixels wide at 96 pixels height; most carry an arm or a sign."""
    rng = scene.rng
    foot, x = scene.base_y(near), rng.uniform(0.03, 0.97) * scene.width
    tall = scene.height * (0.2 + 0.6 * near) * rng.uniform(0.6, 1.1)
    wide = max(1, round(scene.height * (0.006 + 0.018 * near)))
    lean = rng.normal(0, 0.015) * tall
    grey = scene.tint((95, 95, 95), (150, 150, 145), (60, 65, 60))
    top = foot - tall
    path = [(x, foot), (x + lean, top)]
    kind = rng.random()
    if kind < 0.3:
        path.append((x + lean + rng.choice([-1, 1]) * tall * rng.uniform(0.15, 0.4), top - 0.02 * tall))
    scene.add(POLE, scene.lines([path], wide), grey, 3 * scene.fine, rim=0.1)
    if kind < 0.4:
        return
    size = max(2.0, scene.height * (0.025 + 0.06 * near) * rng.uniform(0.8, 1.3))
    corners = {0: 4, 1: 3, 2: 8, 3: 14}[int(rng.integers(4))]
    angle = np.arange(corners) * (2 * math.pi / corners) + (math.pi / 4 if corners == 4 else math.pi / 2)
    outline = np.stack([np.cos(angle), np.sin(angle)], 1) * size
    if corners == 4:
        outline *= (rng.uniform(0.6, 1.8), 1.0)
    centre = np.array([x + lean, top + rng.uniform(0, 0.15) * tall])
    face = scene.tint((190, 60, 50), (55, 90, 165), (215, 185, 60), (215, 215, 210))
    scene.add(SIGN, scene.polygon(outline + centre), face, 2 * scene.fine, rim=0.25)
    scene.paint(scene.polygon(0.55 * outline + centre), scene.tint((225, 225, 220), (60, 60, 60)))


def _car(scene: _Scene, near: float) -> None:
    rng = scene.rng
    foot, x = scene.base_y(near), rng.uniform(-0.05, 1.05) * scene.width
    tall = scene.height * (0.05 + 0.24 * near) * rng.uniform(0.85, 1.15)
    side = rng.random() < 0.6
    half = tall * (rng.uniform(1.1, 1.5) if side else rng.uniform(0.55, 0.7))
    shadow = scene.box(x - 1.05 * half, foot - 0.08 * tall, x + 1.05 * half, foot + 0.08 * tall)
    scene.paint(shadow & (scene.labels == ROAD), scene.tint((45, 45, 50), spread=6))
    belt, roof = foot - 0.55 * tall, foot - tall
    shift = half * rng.uniform(-0.15, 0.15)
    cabin = [(-0.75, belt), (-0.45, roof), (0.4, roof), (0.7, belt)]
    body = scene.box(x - half, belt, x + half, foot - 0.12 * tall)
    body |= scene.polygon([(x + shift + half * along, y) for along, y in cabin])
    radius = 0.2 * tall
    at = 0.62 * half if side else 0.8 * half
    wheels = scene.ellipses([(hub - radius, foot - 2 * radius, hub + radius, foot) for hub in (x - at, x + at)])
    paint = scene.tint((150, 40, 40), (50, 70, 130), (190, 190, 190), (60, 60, 65), (115, 110, 105))
    scene.add(CAR, body | wheels, paint, 3 * scene.fine + 6 * scene.coarse, rim=0.5)
    scene.paint(wheels, scene.tint((40, 40, 42), spread=5))
    glass = [(-0.58, belt), (-0.38, roof + 0.1 * tall), (0.33, roof + 0.1 * tall), (0.52, belt)]
    window = scene.polygon([(x + shift + half * along, y) for along, y in glass])
    scene.paint(window, scene.tint((75, 90, 105), (140, 160, 185)), 4 * scene.coarse)


def _person(scene: _Scene, near: float) -> None:
    """Head, body and two legs that leave a gap; some people stand together."""
    rng = scene.rng
    foot, x = scene.base_y(near), rng.uniform(0.02, 0.98) * scene.width
    tall = scene.height * (0.09 + 0.34 * near) * rng.uniform(0.85, 1.15)
    for _ in range(1 + (rng.random() < 0.25)):
        head, shoulder, hip = 0.075 * tall, foot - 0.82 * tall, foot - 0.48 * tall
        stride, broad = tall * rng.uniform(0.02, 0.16), 0.13 * tall
        thick = max(1, round(0.085 * tall))
        legs = [[(x, hip), (x - stride, foot)], [(x, hip), (x + stride, foot)]]
        arms = [[(x, shoulder), (x + way * tall * rng.uniform(0.08, 0.2), hip)] for way in (-1, 1)]
        waist = 0.7 * broad
        torso = scene.polygon([(x - broad, shoulder), (x + broad, shoulder), (x + waist, hip), (x - waist, hip)])
        torso |= scene.lines(arms, max(1, thick - 1))
        lower = scene.lines(legs, thick)
        face = scene.ellipses([(x - head, shoulder - 2.2 * head, x + head, shoulder)])
        coat = scene.tint((120, 55, 50), (55, 65, 105), (75, 95, 65), (150, 145, 135), (50, 50, 52))
        scene.add(PERSON, torso | lower | face, coat, 5 * scene.fine, rim=0.4)
        scene.paint(lower, scene.tint((50, 55, 75), (80, 75, 70)), 4 * scene.fine)
        scene.paint(face, scene.tint((190, 150, 125), (120, 85, 65)))
        x += 0.35 * tall


# ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write synthetic street scenes with label masks.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write into; created if missing")
    parser.add_argument("--train", type=int, default=200, help="scenes for training (200)")
    parser.add_argument("--val", type=int, default=50, help="scenes for validation (50)")
    parser.add_argument("--size", default="96x128", help="HEIGHTxWIDTH in pixels, at least 32x32 (96x128)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace scenes that OUT already holds")
    args = parser.parse_args(arguments)
    try:
        height, width = (int(part) for part in args.size.lower().split("x"))
    except ValueError:
        parser.error(f"--size: expected HEIGHTxWIDTH such as 96x128, got {args.size!r}")
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {args.seed}")
    try:
        write_scenes(
            args.folder,
            train=args.train,
            val=args.val,
            size=(height, width),
            seed=args.seed,
            overwrite=args.overwrite,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    counts = f"{args.train} scenes in train, {args.val} in val"
    print(f"{args.folder}: {counts}, {len(CLASS_NAMES)} classes, void {IGNORE_INDEX}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
