"""What an error about mask files advises works: the code in its text is run on the files, which are then read.

Tensors and Datasets of masks for train_proxy, and the command line, are here, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_fixtures import TINY, Items

from semeda_fast import EdgeProxy, train_proxy
from semeda_fast.errors import MaskFileError
from semeda_fast.inspection import inspect_mask
from semeda_fast.proxy.masks import MaskFolder, read_mask

pytest.importorskip("typer")
from typer.testing import CliRunner

from semeda_fast import cli


class Row(NamedTuple):
    """A file whose pixels hold `labels` in turn, and one way to mend it.

    Attributes:
        change: whether the code in the message is run.
        options: of the right call; the message names each, for Python and for the command line.
        right: the labels that are read then.
    """

    labels: list[int]
    classes: int
    right: list[int]
    change: bool = True
    options: dict[str, int] = {}  # noqa: RUF012  # never written to
    ignore_index: int | None = None
    mode: str = "L"


TABLE = {
    "binary mask": Row([0, 255], 2, [0, 1]),
    "binary mask in a palette": Row([0, 255], 2, [0, 1], mode="P"),
    "binary mask with the default of the command line": Row([0, 255], 2, [0, 1], ignore_index=-100),
    "binary mask with void": Row([0, 255, 7], 2, [0, 1, 7], ignore_index=7),
    "binary mask for many classes": Row([0, 255], 5, [0, 1], options={"num_classes": 2}),
    "void": Row([0, 1, 255], 2, [0, 1, 255], False, {"ignore_index": 255}),
    "void and more classes": Row([0, 3, 7, 255], 5, [0, 3, 7, 255], False, {"ignore_index": 255, "num_classes": 8}),
    "trimap": Row([0, 128, 255], 2, [0, 255, 1], options={"ignore_index": 255}),
    "trimap, 255 as void": Row([0, 128, 255], 2, [0, 255, 1], ignore_index=255),
    "greys": Row([0, 128, 255], 3, [0, 1, 2]),
    "from 1": Row([1, 2, 3], 3, [0, 1, 2]),
    "from 1 with void": Row([1, 2, 3, 255], 3, [0, 1, 2, 255], options={"ignore_index": 255}),
    "one class too few": Row([0, 1, 2, 3], 3, [0, 1, 2, 3], False, {"num_classes": 4}),
    "a void label behind the classes": Row([0, 1, 2, 3], 3, [0, 1, 2, 3], False, {"ignore_index": 3}),
    "nodata": Row([0, 1, -9999], 2, [0, 1, -9999], False, {"ignore_index": -9999}, mode="I"),
    "nodata beside void": Row([0, 1, -9999, 255], 2, [0, 1, 255, 255], ignore_index=255, mode="I"),
    "several void labels": Row([0, 1, 255, 60000], 2, [0, 1, 255, 255], options={"ignore_index": 255}, mode="I"),
}


def labelled(labels: list[int], dtype: type = np.int32) -> np.ndarray[Any, Any]:
    """[32,36] with the labels in turn, in stripes."""
    return np.repeat(np.resize(np.array(labels, dtype), (32, 9)), 4, axis=1)


def write(path: Path, row: Row) -> Path:
    mask = labelled(row.labels)
    image = Image.fromarray(mask if row.mode == "I" else mask.astype(np.uint8))
    if row.mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(path)
    return path


def rewrite(message: str, paths: list[Path]) -> None:
    """Run the code of a message for each file."""
    code = message.partition("write each file anew: ")[2].partition(".save(path)")[0] + ".save(path)"
    assert code.startswith("mask = np.array(Image.open(path));")
    for path in paths:
        exec(code, {"np": np, "Image": Image, "path": path})


@pytest.mark.parametrize("name", TABLE)
def test_files(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    path = write(tmp_path / ("mask.tif" if row.mode == "I" else "mask.png"), row)
    options = {"num_classes": row.classes, "ignore_index": row.ignore_index}
    with pytest.raises(MaskFileError, match="values that are no labels") as caught:
        read_mask(path, **options)
    text = str(caught.value).partition("(num_classes=")[2]
    for option, value in row.options.items():
        assert f"{option}={value} (--{option.replace('_', '-')} {value})" in text
    if row.change:
        rewrite(text, [path])
    found = read_mask(path, **{**options, **row.options})
    np.testing.assert_array_equal(found, labelled(row.right))


@pytest.mark.parametrize("classes", [2, 3, 21])
def test_255_is_no_void_label_in_a_binary_file(classes: int, tmp_path: Path) -> None:
    path = write(tmp_path / "mask.png", TABLE["binary mask"])
    with pytest.raises(MaskFileError) as caught:
        read_mask(path, num_classes=classes)
    assert "ignore_index=255" not in str(caught.value)
    assert "--ignore-index 255" not in str(caught.value)


def boxes(count: int = 3, size: int = 24) -> Tensor:
    """Binary masks [M,H,W] uint8."""
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[:, 6:18, 4:16] = 1
    return masks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 0 and 255."""
    (tmp_path / "masks").mkdir()
    for number, mask in enumerate(boxes()):
        Image.fromarray((255 * mask).numpy()).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path / "masks"


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_train_proxy_on_a_folder(folder: Path, ignore_index: int) -> None:
    """With 255 as void there is no edge, and the same remedy."""
    with pytest.raises(ValueError, match=r"no labels|no edge") as caught:
        train_proxy(folder, 2, ignore_index=ignore_index, **TINY)
    rewrite(str(caught.value), sorted(folder.iterdir()))
    assert train_proxy(folder, 2, ignore_index=ignore_index, **TINY).num_classes == 2
    assert MaskFolder(folder)[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_train_proxy_on_a_tensor(ignore_index: int) -> None:
    masks = 255 * boxes()
    with pytest.raises(ValueError, match=r"pass masks // 255, unless") as caught:
        train_proxy(masks, 2, ignore_index=ignore_index, **TINY)
    assert "pass ignore_index=255" not in str(caught.value)
    assert train_proxy(masks // 255, 2, ignore_index=ignore_index, **TINY).num_classes == 2


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_train_proxy_on_a_dataset(ignore_index: int) -> None:
    masks = Items(list(255 * boxes()))
    with pytest.raises(ValueError, match=r"let the Dataset give mask // 255, unless"):
        train_proxy(masks, 2, ignore_index=ignore_index, **TINY)
    assert train_proxy(Items([mask // 255 for mask in masks.items]), 2, **TINY).num_classes == 2


ITEMS: dict[str, tuple[Any, str]] = {
    "a channel": (boxes().unsqueeze(1), "mask.squeeze(0)"),
    "a last channel": (boxes().unsqueeze(3), "mask.squeeze(2)"),
    "floats": (boxes().float(), "mask.long()"),
    "floats with a channel": (boxes().unsqueeze(1).double(), "mask.squeeze(0).long()"),
    "by ToTensor": (boxes().unsqueeze(1).float() / 255, "(mask.squeeze(0) * 255).round().long()"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_items_of_another_shape(name: str) -> None:
    items, code = ITEMS[name]
    with pytest.raises(ValueError, match=r"mask [0-9] must be integer labels") as caught:
        train_proxy(Items(list(items)), 2, **TINY)
    assert code in str(caught.value)
    mended = [eval(code, {"torch": torch, "mask": item}) for item in items]
    assert all(torch.equal(mask, truth.to(mask.dtype)) for mask, truth in zip(mended, boxes(), strict=True))
    assert train_proxy(Items(mended), 2, **TINY).num_classes == 2


@pytest.mark.parametrize(("shape", "code"), [((24, 24), "masks.unsqueeze(0)"), ((3, 1, 24, 24), "masks.squeeze(1)")])
def test_a_tensor_of_another_shape(shape: tuple[int, ...], code: str) -> None:
    masks = boxes()[: shape[0] if len(shape) == 4 else 1].reshape(shape)
    with pytest.raises(ValueError, match="must have the shape") as caught:
        train_proxy(masks, 2, **TINY)
    assert f"pass {code}" in str(caught.value)
    assert train_proxy(eval(code, {"masks": masks}), 2, **TINY).num_classes == 2


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def test_the_command_line_on_a_binary_mask(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, picture = folder / "0.png", tmp_path / "seen.png"
    failed = run("inspect", path, "--output", picture)
    assert failed.exit_code == 2
    assert "--ignore-index 255" not in failed.stderr
    noted = run("inspect", path, "--output", picture, "--ignore-index", 255)
    assert noted.exit_code == 0
    for text in (failed.stderr, noted.stderr):
        assert "0 and 255 alone are a binary mask" in text
    rewrite(failed.stderr, [path])
    done = run("inspect", path, "--output", picture, "--overwrite")
    assert done.exit_code == 0
    assert "no edge" not in done.stderr


def test_the_command_line_on_other_labels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many, nodata = [0, 1, 255], [0, 1, -9999]
    advised = ((many, "--ignore-index 255"), (many, "--num-classes 256"), (nodata, "--ignore-index -9999"))
    for labels, option in advised:
        path, picture = tmp_path / "mask.tif", tmp_path / "seen.png"
        Image.fromarray(labelled(labels)).save(path)
        failed = run("inspect", path, "--output", picture, "--overwrite")
        assert failed.exit_code == 2
        assert option in failed.stderr
        done = run("inspect", path, "--output", picture, "--overwrite", *option.split())
        assert done.exit_code == 0, done.stderr


def test_arrays() -> None:
    """What inspect_mask takes."""
    proxy = EdgeProxy.bundled(2)
    labels = 255 * boxes(1)[0].numpy()
    with pytest.raises(ValueError, match="pass labels // 255") as caught:
        inspect_mask(labels, proxy)
    assert "ignore_index=255" not in str(caught.value)
    assert inspect_mask(labels // 255, proxy).edges.any()
