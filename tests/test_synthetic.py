"""Synthetic masks and the demo's scenes: valid, varied, and the same each time."""

from __future__ import annotations

import builtins
import pickle
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from semeda_fast.errors import MissingExtraError
from semeda_fast.proxy import synthetic
from semeda_fast.proxy.masks import MaskFolder, pair_files, read_pair
from semeda_fast.proxy.synthetic import SyntheticMasks, synthetic_mask

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import scenes  # noqa: E402


def draw(i: int, num_classes: int, size: tuple[int, int] = (64, 64), **options: Any) -> np.ndarray:
    return synthetic_mask(num_classes, size, rng=np.random.default_rng([7, i]), **options)


# ----------------------------------------------------------------------------------------------------
# Synthetic masks


@pytest.mark.parametrize("num_classes", [1, 2, 3, 21, 150, 256])
@pytest.mark.parametrize("void", [-100, 255, 300, None])
def test_values_are_labels_or_void(num_classes: int, void: int | None) -> None:
    labels = [c for c in range(num_classes) if c != void]
    for i in range(40):
        mask = draw(i, num_classes, ignore_index=void)
        assert mask.dtype == np.int16
        assert mask.shape == (64, 64)
        assert np.isin(mask, labels if void is None else [*labels, void]).all()
        assert mask.flags.writeable


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (3, 5), (31, 7), (40, 200)])
def test_any_size(size: tuple[int, int]) -> None:
    for i in range(60):
        mask = draw(i, 5, size)
        assert mask.shape == size
        assert np.isin(mask, [-100, 0, 1, 2, 3, 4]).all()


def test_one_class_is_constant_but_for_void() -> None:
    for i in range(40):
        assert (draw(i, 1, ignore_index=None) == 0).all()
    assert any((draw(i, 1) == -100).any() for i in range(40))


def test_a_void_label_among_the_classes_replaces_one() -> None:
    # With two classes and ignore_index=1, all that is no void is class 0.
    masks = [draw(i, 2, ignore_index=1) for i in range(60)]
    share = np.mean([(m == 1).mean() for m in masks])
    assert 0.002 < share < 0.15


def test_a_mask_holds_a_few_classes_and_many_masks_hold_all() -> None:
    masks = [draw(i, 256, (24, 24), ignore_index=None) for i in range(400)]
    counts = [len(np.unique(m)) for m in masks]
    assert max(counts) <= synthetic.MAX_CLASSES_PER_MASK
    assert max(counts) >= 8
    assert np.mean(counts) > 3
    assert len(np.unique(masks)) == 256


def test_each_pair_of_classes_touches_somewhere() -> None:
    seen = set()
    for i in range(150):
        mask = draw(i, 8, (24, 24), ignore_index=None)
        for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
            seen |= {(min(p), max(p)) for p in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)}
    assert seen >= set(combinations(range(8), 2))


def test_the_share_of_void() -> None:
    voids = np.array([(draw(i, 21) == -100).mean() for i in range(200)])
    assert 0.3 < (voids > 0).mean() < 0.7
    assert 0.005 < voids.mean() < 0.06
    assert voids.max() < 0.9
    assert all((draw(i, 21, ignore_index=None) >= 0).all() for i in range(50))


def test_the_masks_vary() -> None:
    """Flat and busy masks, single pixels, thin lines, holes, rims: each in a good part of the masks."""
    masks = [draw(i, 21, (96, 96)) for i in range(60)]
    flat = singles = scattered = thin = holes = rims = 0
    busy = []
    for mask in masks:
        values, counts = np.unique(mask, return_counts=True)
        flat += counts.max() > 0.6 * mask.size
        busy.append((mask[:, 1:] != mask[:, :-1]).mean())
        has_thin = has_hole = False
        alone = 0
        for value in values[values >= 0]:
            parts, _ = ndimage.label(mask == value)
            sizes = np.bincount(parts.ravel())[1:]
            alone += (sizes == 1).sum()
            for part in np.flatnonzero(sizes >= 20) + 1:
                region = parts == part
                has_thin |= not ndimage.binary_erosion(region, np.ones((3, 3))).any()
                has_hole |= bool((ndimage.binary_fill_holes(region) & ~region).any())
        singles, thin, holes = singles + (alone > 0), thin + has_thin, holes + has_hole
        scattered += alone > 20
        void = mask == -100
        rims += void.any() and not ndimage.binary_erosion(void, np.ones((5, 5))).any()
    assert flat > 10
    assert scattered > 5
    assert singles > 20
    assert thin > 20
    assert holes > 20
    assert rims > 5
    assert min(busy) < 0.01
    assert max(busy) > 0.2


@pytest.mark.parametrize("drawn", synthetic._OBJECTS, ids=lambda f: f.__name__)
def test_each_object_draws_and_rims_follow_its_border(drawn: Any) -> None:
    rimless = drawn.__name__ in ("_fence", "_blobs")
    pixels, voids = [], []
    for i in range(30):
        background = np.zeros((64, 64), np.uint8)
        rim = i % 3 + 1
        canvas = synthetic._Canvas(background, np.random.default_rng(i))
        drawn(canvas, np.array([5, 6, 7]), rim, np.random.default_rng(i))
        labels, void = canvas.labels(), canvas.void()
        assert np.isin(labels, [0, 5, 6, 7]).all()
        plain = synthetic._Canvas(background, np.random.default_rng(i))
        drawn(plain, np.array([5, 6, 7]), 0, np.random.default_rng(i))
        assert not plain.void().any()
        np.testing.assert_array_equal(plain.labels(), labels)  # a rim moves no label
        pixels.append((labels != 0).sum())
        voids.append(void.sum())
        if labels.any():
            # A rim never strays from its object, which near the image's border may lie outside.
            far = ndimage.distance_transform_edt(labels == 0) > 4
            assert not (far & void)[6:-6, 6:-6].any()
    assert np.count_nonzero(pixels) >= 20
    assert max(pixels) > 20
    assert (np.count_nonzero(voids) == 0) if rimless else (np.count_nonzero(voids) >= 15)


def test_later_objects_cover_the_void_of_earlier_ones() -> None:
    canvas = synthetic._Canvas(np.zeros((20, 20), np.uint8), np.random.default_rng(0))
    square = np.array([(4, 4), (14, 4), (14, 14), (4, 14)])
    canvas.polygon(square, 1, rim=3)
    before = canvas.void().copy()
    assert before.any()
    canvas.polygon(square + np.array([5, 0]), 2)
    covered = canvas.labels() == 2
    assert (before & covered).any()
    np.testing.assert_array_equal(canvas.void(), before & ~covered)
    canvas.line(np.array([(0, 9), (19, 9)]), 3, width=1)
    assert not canvas.void()[9].any()


def test_scattered_pixels_are_few_and_of_the_classes() -> None:
    for seed in range(30):
        mask = np.full((50, 60), 9, np.int16)
        synthetic._scatter(mask, np.array([3, 4]), np.random.default_rng(seed))
        assert np.isin(mask, [3, 4, 9]).all()
        assert 1 <= (mask != 9).sum() <= 31


def test_rims_of_a_class_cover_its_border_and_no_more() -> None:
    mask = np.zeros((30, 40), np.int16)
    mask[8:20, 10:25] = 1
    border = np.zeros(mask.shape, bool)
    for y in range(30):
        for x in range(40):
            around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            border[y, x] = any(0 <= a < 30 and 0 <= b < 40 and mask[a, b] != mask[y, x] for a, b in around)
    widths = set()
    for seed in range(10):
        rim = synthetic._class_rims(mask, np.array([1, 0]), np.random.default_rng(seed))
        assert rim[border].all()
        assert not rim[~ndimage.binary_dilation(border)].any()
        widths.add(int(rim[14].sum()))
    assert widths == {4, 8}  # two borders in that row, 2 or 4 pixels each


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, (8, 8)), "num_classes: expected 1 to 256, got 0"),
        ((257, (8, 8)), "num_classes: expected 1 to 256, got 257"),
        ((5, (0, 8)), "size: expected"),
        ((5, (8, -1)), "size: expected"),
        ((5, (8, 8, 8)), "size: expected"),
    ],
)
def test_wrong_arguments(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        synthetic_mask(*arguments, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=words):
        SyntheticMasks(3, *arguments)


def test_wrong_void_labels() -> None:
    with pytest.raises(ValueError, match="16-bit"):
        draw(0, 5, ignore_index=2**15)
    with pytest.raises(ValueError, match="no class"):
        draw(0, 1, ignore_index=0)
    with pytest.raises(ValueError, match="length"):
        SyntheticMasks(-1, 5, (8, 8))
    with pytest.raises(ValueError, match="seed"):
        SyntheticMasks(1, 5, (8, 8), seed=-1)


def test_items_depend_on_seed_and_index_alone() -> None:
    masks = SyntheticMasks(12, 21, (24, 40), seed=3)
    forward = [masks[i] for i in range(12)]
    assert all(m.dtype == torch.int64 and m.shape == (24, 40) for m in forward)
    copy = pickle.loads(pickle.dumps(SyntheticMasks(100, 21, (24, 40), seed=3)))
    assert all(torch.equal(copy[i], forward[i]) for i in reversed(range(12)))
    assert torch.equal(masks[-1], forward[11])
    other = SyntheticMasks(12, 21, (24, 40), seed=4)
    assert not any(torch.equal(other[i], forward[i]) for i in range(12))
    assert not any(torch.equal(a, b) for a, b in combinations(forward, 2))
    expected = synthetic_mask(21, (24, 40), rng=np.random.default_rng([3, 5]))
    assert torch.equal(forward[5], torch.from_numpy(expected).long())
    state = np.random.get_state()[1].copy()  # noqa: NPY002 (to see that it is left alone)
    masks[0]
    assert (state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_dataset_ends_and_batches() -> None:
    masks = SyntheticMasks(5, 21, (16, 16), ignore_index=None)
    assert len(masks) == 5
    for index in (5, -6):
        with pytest.raises(IndexError):
            masks[index]
    (batch,) = torch.utils.data.DataLoader(masks, batch_size=5)
    assert batch.shape == (5, 16, 16)
    assert int(batch.min()) >= 0
    assert len(SyntheticMasks(0, 21, (16, 16))) == 0


def test_pillow_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"semeda-fast\[train\]"):
        draw(0, 5)


# ----------------------------------------------------------------------------------------------------
# The demo's scenes


def make(i: int, size: tuple[int, int] = (96, 128)) -> tuple[np.ndarray, np.ndarray]:
    return scenes.make_scene(size, np.random.default_rng([5, i]))


def test_scenes_hold_all_classes_and_thin_void() -> None:
    drawn = [make(i) for i in range(16)]
    for image, mask in drawn:
        assert (image.shape, image.dtype) == ((96, 128, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((96, 128), np.uint8)
        assert np.isin(mask, [*range(len(scenes.CLASS_NAMES)), scenes.IGNORE_INDEX]).all()
        assert image.std() > 15
    shares = np.bincount(np.concatenate([m.ravel() for _, m in drawn]), minlength=256) / (16 * 96 * 128)
    assert (shares[:8] > 0.003).all()
    assert shares[scenes.ROAD] > 0.2
    assert shares[scenes.POLE] < 0.05  # thin
    void = np.array([(m == 255).mean() for _, m in drawn])
    assert (void == 0).any()
    assert (void > 0).any()
    assert void.max() < 0.2
    for _, mask in drawn:  # void is bands, not areas
        assert ndimage.binary_erosion(mask == 255, np.ones((7, 7))).sum() < 60


def test_colour_alone_does_not_tell_the_classes_apart() -> None:
    """The best table from colours (12 levels per channel) to labels in 40 scenes, tried on 15 others."""

    def bins(image: np.ndarray) -> np.ndarray:
        coarse = image.astype(np.int64) * 12 // 256
        return (coarse[..., 0] * 12 + coarse[..., 1]) * 12 + coarse[..., 2]

    table = np.zeros((12**3, 8), np.int64)
    for i in range(40):
        image, mask = make(i, (64, 96))
        valid = mask != 255
        np.add.at(table, (bins(image)[valid], mask[valid]), 1)
    best, confusion = table.argmax(1), np.zeros((8, 8), np.int64)
    for i in range(40, 55):
        image, mask = make(i, (64, 96))
        valid = mask != 255
        np.add.at(confusion, (mask[valid], best[bins(image)[valid]]), 1)
    iou = np.diag(confusion) / np.maximum(1, confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert iou.mean() < 0.35
    assert iou[[scenes.POLE, scenes.PERSON, scenes.SIGN]].max() < 0.2


def test_nearer_objects_cover_the_void_of_farther_ones() -> None:
    scene = scenes._Scene((40, 40), np.random.default_rng(0))
    scene.rims = True
    scene.add(scenes.CAR, scene.box(5, 5, 20, 20), np.zeros(3), rim=1.0)
    front = scene.box(15, 0, 30, 30)
    assert scene.void[front].any()
    assert not scene.void[8:17, 8:17].any()  # a band, not the whole
    scene.add(scenes.ROAD, front, np.zeros(3))
    assert not scene.void[front].any()
    assert scene.void.any()


@pytest.mark.parametrize("size", [(32, 32), (33, 100), (120, 40)])
def test_scenes_of_any_size(size: tuple[int, int]) -> None:
    for i in range(8):
        image, mask = make(i, size)
        assert image.shape == (*size, 3)
        assert mask.shape == size
    with pytest.raises(ValueError, match="at least 32"):
        make(0, (31, 64))


def test_written_scenes_are_read_back(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path / "out", train=3, val=2, size=(40, 48), seed=9)
    for split, (name, count) in enumerate((("train", 3), ("val", 2))):
        folder = tmp_path / "out" / name
        pairs = pair_files(folder / "images", folder / "masks")
        assert len(pairs) == count
        for i, pair in enumerate(pairs):
            image, mask = read_pair(*pair, num_classes=8, ignore_index=scenes.IGNORE_INDEX)
            expected = scenes.make_scene((40, 48), np.random.default_rng([9, split, i]))
            np.testing.assert_array_equal(image, expected[0])
            np.testing.assert_array_equal(mask, expected[1])
        with Image.open(pairs[0][1]) as stored:
            assert stored.mode == "P"
            assert stored.convert("RGB").getpixel((24, 39)) in set(scenes._PALETTE.values())
        assert len(MaskFolder(folder / "masks", num_classes=8, ignore_index=255)) == count


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    scenes.write_scenes(out, train=3, val=1, size=(32, 32))
    mine = out / "train/images/mine.png"
    mine.write_bytes(b"not a scene")
    first = (out / "train/masks/scene_00000.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"not empty.*--overwrite"):
        scenes.write_scenes(out, train=1, val=1, size=(32, 32), seed=1)
    assert (out / "train/masks/scene_00000.png").read_bytes() == first
    scenes.write_scenes(out, train=2, val=0, size=(32, 32), seed=1, overwrite=True)
    assert (out / "train/masks/scene_00000.png").read_bytes() != first
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    scene = ["scene_00000.png", "scene_00001.png"]
    assert left == sorted(
        [*(f"train/{part}/{n}" for part in ("images", "masks") for n in scene), "train/images/mine.png"]
    )
    assert mine.read_bytes() == b"not a scene"
    (tmp_path / "empty").mkdir()
    scenes.write_scenes(tmp_path / "empty", train=1, val=0, size=(32, 32))


def test_wrong_scene_arguments_write_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options in ({"train": -1}, {"val": -2}, {"size": (16, 64)}):
        with pytest.raises(ValueError, match="expected"):
            scenes.write_scenes(out, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        scenes.write_scenes(tmp_path / "file")
    assert not out.exists()


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(EXAMPLES / "scenes.py"),
        str(out),
        "--train",
        "2",
        "--val",
        "1",
        "--size",
        "32x40",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "2 scenes in train, 1 in val" in done.stdout
    assert len(list(out.rglob("*.png"))) == 6
    again = [str(out), "--train", "1", "--val", "1", "--size", "32x40"]
    for wrong, words in (
        ([], "--overwrite"),
        (["--overwrite", "--size", "32"], "HEIGHTxWIDTH"),
        (["--overwrite", "--size", "8x8"], "at least 32"),
        (["--overwrite", "--seed", "-1"], "--seed"),
        (["--overwrite", "--train", "-1"], "0 or more"),
    ):
        with pytest.raises(SystemExit) as left:
            scenes.main([*again, *wrong])
        assert left.value.code == 2
        assert words in capsys.readouterr().err
    assert len(list(out.rglob("*.png"))) == 6
    assert scenes.main([*again, "--overwrite"]) == 0
    assert len(list(out.rglob("*.png"))) == 4
