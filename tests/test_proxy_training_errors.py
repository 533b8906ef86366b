"""Bad input of train_proxy."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_fixtures import TINY, Items, scenes, write_folder

from semeda_fast import train_proxy
from semeda_fast.errors import MaskFileError
from semeda_fast.proxy import training

# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"void": "skip"}, "void must be 'mask' or 'nearest', got 'skip'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"crop_size": -4}, "crop_size must be at least 1, got -4"),
        ({"noise": -0.1}, "noise must be >= 0"),
        ({"noise": float("nan")}, "noise must be >= 0"),
        ({"noise": float("inf")}, "noise must be >= 0"),
        ({"lr": 0.0}, "lr > 0, got 0.1 and 0.0"),
        ({"lr": float("nan")}, "lr > 0"),
        ({"temperature": 0.0}, "temperature must be a positive number or 'auto', got 0"),
        ({"temperature": "warm"}, "temperature must be a positive number or 'auto', got 'warm'"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1"),
        ({"val_fraction": -0.1}, r"val_fraction must lie in \[0, 1\), got -0.1"),
        ({"radius": 0}, "radius must be at least 1 pixel, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"widths": (0,)}, "at least 1 channel"),
        ({"tap": "mid"}, "tap must be one of"),
        ({"distance": "cosine"}, "distance must be one of"),
        ({"layer_weights": (1,)}, "the proxy has 3 layers, got 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_proxy(scenes(3), **{"num_classes": 4, **TINY, **options})


@pytest.mark.parametrize("shape", [(40, 40), (2, 1, 40, 40), (40,)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the shape \[M,H,W\], got \[" + ", ".join(map(str, shape))):
        train_proxy(torch.zeros(shape, dtype=torch.int64), 4, **TINY)


@pytest.mark.parametrize("masks", [3, None, object(), (mask for mask in scenes(2))], ids=lambda x: type(x).__name__)
def test_what_is_no_source_of_masks_is_refused(masks: Any) -> None:
    message = r"a tensor \[M,H,W\], a folder or a Dataset with a length, got " + type(masks).__name__
    with pytest.raises(TypeError, match=message):
        train_proxy(masks, 4, **TINY)
    if masks is not None:
        with pytest.raises(TypeError, match=message):
            train_proxy(scenes(2), 4, val_masks=masks, **TINY)


@pytest.mark.parametrize("masks", [torch.zeros(0, 4, 4, dtype=torch.int64), Items([])], ids=["tensor", "Dataset"])
def test_no_mask_at_all_is_refused(masks: Any) -> None:
    with pytest.raises(ValueError, match="is empty"):
        train_proxy(masks, 4, **TINY)
    with pytest.raises(ValueError, match="is empty"):
        train_proxy(scenes(2), 4, val_masks=masks, **TINY)


def test_labels_out_of_range_name_the_mask_the_range_and_ignore_index() -> None:
    masks = scenes(3)
    masks[1, 0, 0] = 255
    masks[1, 0, 1] = -7
    with pytest.raises(ValueError, match="mask 1 holds labels from -7 to 255, expected 0 to 3 or ignore_index=-100"):
        train_proxy(masks, 4, val_fraction=0, **{**TINY, "steps": 20})
    masks[1] = 0
    masks[1, 3, 3] = 4
    with pytest.raises(ValueError, match="mask 1 holds labels from 0 to 4, expected 0 to 3"):
        train_proxy(scenes(2), 4, val_masks=masks, **TINY)


def test_uint8_labels_are_not_wrapped_to_ignore_index() -> None:
    masks = scenes(3).to(torch.uint8)
    masks[:, 0, 0] = 156  # -100 modulo 256
    with pytest.raises(ValueError, match="from 0 to 156, expected 0 to 3 or ignore_index=-100"):
        train_proxy(masks, 4, **TINY)


@pytest.mark.parametrize(
    "item",
    [
        torch.zeros(4, 4),
        torch.zeros(1, 4, 4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
        (torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.int64)),
        {"mask": torch.zeros(4, 4, dtype=torch.int64)},
        None,
    ],
    ids=["floats", "a channel", "one row", "no pixel", "image and mask", "a dict", "None"],
)
def test_items_that_are_no_masks_are_refused_by_their_number(item: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="mask 0 "):
        train_proxy(Items([item]), 4, **TINY)


@pytest.mark.parametrize("value", [0, 3, 255])
def test_masks_without_an_edge_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"the masks hold no edge: .*check num_classes and masks"):
        train_proxy(torch.full((3, 16, 16), value), 4, ignore_index=255, **TINY)


def test_a_missing_an_empty_and_a_broken_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no"))):
        train_proxy(tmp_path / "no", 4, **TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "empty"))):
        train_proxy(str(tmp_path / "empty"), 4, **TINY)
    folder = write_folder(tmp_path / "masks", scenes(3))
    image = folder / "001.png"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(MaskFileError, match=r"001\.png"):
        train_proxy(folder, 4, val_fraction=0, **{**TINY, "steps": 20})
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(image)
    with pytest.raises(MaskFileError, match=r"001\.png .*9"):
        train_proxy(folder, 4, val_fraction=0, **{**TINY, "steps": 20})


def test_validation_masks_are_read_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used last, and what was trained until then would be lost."""
    monkeypatch.setattr(training, "one_cycle", lambda progress: pytest.fail("it trained first"))
    bad = scenes(3)
    bad[2, 4, 4] = 9
    with pytest.raises(ValueError, match="mask 2 holds labels from 0 to 9"):
        train_proxy(scenes(3), 4, val_masks=bad, **TINY)
    with pytest.raises(ValueError, match=r"mask \d holds labels from 0 to 9"):
        train_proxy(torch.stack([bad[2]] * 3), 4, **TINY)


class Without:
    """An import finder that behaves as if a package were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("package", ["accelerate", "tqdm"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"train_proxy needs .*'{package}'.* pip install 'semeda-fast\[train\]'"):
        train_proxy(scenes(3), 4, **TINY)


def test_nearest_without_scipy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    masks = scenes(3)
    masks[:, :8] = 255
    with pytest.raises(ImportError, match=r"void='nearest' needs .*'scipy'.* pip install 'semeda-fast\[train\]'"):
        train_proxy(masks, 4, ignore_index=255, void="nearest", **TINY)
