"""examples/train.py, whose --ignore-index is 255 by default, on binary masks of 0 and 255."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import data
import options
from test_advice_files import boxes, rewrite


def arguments(root: Path, *more: str) -> list[str]:
    return [
        *("--images", str(root / "images"), "--masks", str(root / "masks"), "--num-classes", "2"),
        *("--batch-size", "2", "--output", str(root / "run"), *more),
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, mask in enumerate(boxes(20)):
        picture = np.repeat(mask.numpy()[..., None] * 100, 3, axis=2)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number:02d}.png")
        Image.fromarray(255 * mask.numpy()).save(tmp_path / "masks" / f"{number:02d}.png")
    return tmp_path


def test_a_foreground_that_is_void_is_found_before_the_training(root: Path) -> None:
    args = options.parse_args(arguments(root), "")
    with pytest.raises(data.InputError, match="0 and 255 alone are a binary mask") as caught:
        data.make_datasets(args)
    rewrite(str(caught.value), sorted((root / "masks").iterdir()))
    train_set, _ = data.make_datasets(args)
    assert np.unique(train_set.read(0)[1]).tolist() == [0, 1]


def test_data_with_void_and_little_foreground_is_taken(root: Path) -> None:
    """One mask with a 1 among many without."""
    paths = sorted((root / "masks").iterdir())
    args = options.parse_args(arguments(root), "")
    held_out = {pair[1] for pair in _validation(args)}
    one = next(path for path in paths if path not in held_out)
    mask = np.array(Image.open(one))
    mask[0, 0] = 1
    Image.fromarray(mask).save(one)
    train_set, _ = data.make_datasets(args)
    assert len(train_set) == 16


def _validation(args: object) -> list[tuple[Path, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_look_for_foreground", lambda dataset: None)
        return data.make_datasets(args)[1].pairs
