"""Mask files: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semeda_fast.errors import MaskFileError, MissingExtraError
from semeda_fast.proxy.masks import MaskFolder, pair_files, read_mask, read_pair

CAMVID = Path(__file__).resolve().parents[2] / "shared/data/camvid/val"
LABELS = np.array([[0, 1, 2, 3, 3], [2, 2, 1, 0, 0], [3, 1, 1, 1, 2]], np.uint8)  # [3, 5]: no multiple of 8 wide


def grey_png(labels: np.ndarray, bits: int) -> bytes:
    """A grey PNG of any bit depth, written from the specification (Pillow writes no 2 or 4 bits)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = labels.shape
    rows = b""
    for row in labels:
        written = "".join(format(int(v), f"0{bits}b") for v in row)
        written += "0" * (-len(written) % 8)
        rows += b"\0" + bytes(int(written[i : i + 8], 2) for i in range(0, len(written), 8))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_tiff(labels: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF with one strip, written from the specification."""
    height, width = labels.shape
    rows = b""
    for row in labels:
        written = "".join(format(int(v), f"0{bits}b") for v in row)
        written += "0" * (-len(written) % 8)
        rows += bytes(int(written[i : i + 8], 2) for i in range(0, len(written), 8))
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0)]
    tags += [(277, 1), (278, height), (279, len(rows))]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else v) for tag, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + rows


def save(path: Path, labels: np.ndarray, mode: str = "L", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([(37 * i + 11 * c) % 256 for i in range(256) for c in range(3)])
    image.save(path, **options)
    return path


# ----------------------------------------------------------------------------------------------------
# What is read


def test_palette_images_give_indices(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[0, 0] = 255  # VOC's rim
    mask = read_mask(save(tmp_path / "voc.png", labels, "P"), num_classes=4, ignore_index=255)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, labels)
    for extension in ("bmp", "tif"):
        np.testing.assert_array_equal(read_mask(save(tmp_path / f"a.{extension}", labels, "P")), labels)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palettes_give_indices(tmp_path: Path, bits: int) -> None:
    labels = LABELS % 2**bits
    path = save(tmp_path / "small.png", labels, "P", bits=bits)
    assert path.read_bytes()[24] == bits  # the file itself is of that depth
    np.testing.assert_array_equal(read_mask(path), labels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_of_each_bit_depth_gives_the_stored_labels(tmp_path: Path, bits: int, kind: str) -> None:
    labels = (np.arange(3 * 37).reshape(3, 37) % 2**bits).astype(np.uint8)
    path = tmp_path / f"grey.{kind}"
    path.write_bytes(grey_png(labels, bits) if kind == "png" else grey_tiff(labels, bits))
    mask = read_mask(path, num_classes=2**bits)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, labels)


def test_one_bit_images(tmp_path: Path) -> None:
    labels = LABELS % 2
    path = save(tmp_path / "one.png", labels.astype(bool))
    with Image.open(path) as image:
        assert image.mode == "1"
    mask = read_mask(path, num_classes=2)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, labels)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, kind: str) -> None:
    labels = LABELS.astype(np.uint16) * 20000  # up to 60000: beyond int16
    path = tmp_path / f"deep.{kind}"
    if kind == "png":
        path.write_bytes(grey_png(labels, 16))
    else:
        Image.fromarray(labels).save(path)
    mask = read_mask(path)
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, labels)


def test_thirty_two_bits_may_be_negative(tmp_path: Path) -> None:
    labels = LABELS.astype(np.int32) - 1
    path = save(tmp_path / "signed.tif", labels)
    np.testing.assert_array_equal(read_mask(path, num_classes=3, ignore_index=-1), labels)
    with pytest.raises(MaskFileError, match=r"-1 \(3 pixels\)"):
        read_mask(path, num_classes=3)


def test_the_array_is_writable_and_a_string_is_a_path(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", LABELS)
    mask = read_mask(str(path))
    np.testing.assert_array_equal(mask, LABELS)
    assert mask.flags.writeable
    assert torch.equal(MaskFolder(str(tmp_path))[0], torch.from_numpy(LABELS).long())


# ----------------------------------------------------------------------------------------------------
# Wrong values


def refused(path: Path, *words: str, **options: Any) -> str:
    with pytest.raises(MaskFileError) as caught:
        read_mask(path, **options)
    text = str(caught.value)
    for word in (str(path), *words):
        assert word in text, text
    return text


def test_wrong_values_are_named_with_their_counts(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", LABELS)
    text = refused(path, "2 (4 pixels)", "3 (3 pixels)", "expected 0 to 1", "num_classes=2", num_classes=2)
    assert "num_classes=4" in text  # the hint
    assert "ignore_index=7" in refused(path, "expected 0 to 1 or", num_classes=2, ignore_index=7)
    labels = LABELS.copy()
    labels[0, 0] = 9
    assert "9 (1 pixel)" in refused(save(tmp_path / "b.png", labels), num_classes=4)
    many = np.arange(40, dtype=np.uint8).reshape(4, 10)
    assert "and 15 more" in refused(save(tmp_path / "c.png", many), "20 (1 pixel)", num_classes=20)


def test_the_void_label_is_let_through_and_nothing_else(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[1, 1] = 200
    path = save(tmp_path / "a.png", labels)
    np.testing.assert_array_equal(read_mask(path, num_classes=4, ignore_index=200), labels)
    np.testing.assert_array_equal(read_mask(path), labels)  # nothing is checked without num_classes
    refused(path, "200", num_classes=4, ignore_index=201)
    refused(path, "200", num_classes=4, ignore_index=-100)
    np.testing.assert_array_equal(read_mask(path, num_classes=201), labels)
    refused(path, "200", num_classes=200)


def with_value(tmp_path: Path, value: int, base: np.ndarray = LABELS) -> Path:
    labels = base.copy()
    labels[0, 0] = value
    return save(tmp_path / f"value{value}.png", labels)


def test_hints(tmp_path: Path) -> None:
    void = with_value(tmp_path, 255)
    assert "pass ignore_index=255" in refused(void, num_classes=4)
    assert "pass ignore_index=255" in refused(void, num_classes=4, ignore_index=11)
    assert "num_classes=4 (--num-classes 4) if the others" in refused(void, "ignore_index=255", num_classes=2)
    eleven = with_value(tmp_path, 4)
    text = refused(eleven, num_classes=4)
    assert "pass ignore_index=4" in text
    assert "num_classes=5" in text
    assert "labels start at 1" not in text
    ones = save(tmp_path / "ones.png", LABELS + 1)
    assert "start at 1" in refused(ones, num_classes=4)
    binary = save(tmp_path / "binary.png", (LABELS > 1).astype(np.uint8) * 255)
    assert "ignore_index=255" not in refused(binary, "Image.fromarray(mask // 255).save(path)", num_classes=2)
    photo = save(tmp_path / "photo.png", np.arange(200, dtype=np.uint8).reshape(10, 20))
    assert "right folder" in refused(photo, num_classes=4)


# ----------------------------------------------------------------------------------------------------
# Files that are no masks


def test_colours_are_refused_with_the_way_out(tmp_path: Path) -> None:
    colours = np.zeros((3, 5, 3), np.uint8)
    colours[..., 1] = LABELS * 60
    assert "label indices" in refused(save(tmp_path / "rgb.png", colours), "RGB", "3 channels", "pattern")
    rgba = np.concatenate([colours, np.full((3, 5, 1), 255, np.uint8)], axis=2)
    refused(save(tmp_path / "rgba.png", rgba), "RGBA", "4 channels", "label indices")
    equal = np.repeat(LABELS[..., None], 3, axis=2)
    refused(save(tmp_path / "equal.png", equal), "channels are equal")
    refused(save(tmp_path / "la.png", equal[..., :2]), "LA", "alpha")
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.tif")
    refused(tmp_path / "cmyk.tif", "CMYK", "label indices")


def test_formats_that_change_labels_are_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.jpg", LABELS), "JPEG", "PNG")
    refused(save(tmp_path / "a.pgm", LABELS), "PPM", "PNG")
    refused(save(tmp_path / "float.tif", LABELS.astype(np.float32)), "mode F", "integers")
    (tmp_path / "white.tif").write_bytes(grey_tiff(LABELS, 8, photometric=0))
    refused(tmp_path / "white.tif", "white", "PNG")


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(LABELS), Image.fromarray(LABELS[::-1].copy())]
    for name in ("a.tif", "a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        refused(tmp_path / name, "2 frames")


def test_missing_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist"):
        read_mask(tmp_path / "nowhere.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_mask(tmp_path)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="file permissions of POSIX")
def test_a_refused_permission_is_not_taken_for_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", LABELS)

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # chmod would not stop root
    with pytest.raises(PermissionError):
        read_mask(path)


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = save(tmp_path / "whole.png", rng.integers(0, 4, (40, 40)).astype(np.uint8)).read_bytes()
    path = tmp_path / "cut.png"
    for length in [*range(0, 60), *range(60, len(whole) - 16, 7)]:  # the last 12 bytes say only that it ends
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cut short")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "damaged"
    for good in (grey_png(LABELS, 8), grey_png(LABELS, 2), grey_tiff(LABELS, 8)):
        for _ in range(60):
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), 3):
                bad[place] = rng.integers(256)
            path.write_bytes(bytes(bad))
            with contextlib.suppress(MaskFileError):
                mask = read_mask(path)
                assert mask.ndim == 2
                assert mask.size > 0


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("these are no pixels")
    refused(tmp_path / "text.png", "not an image")
    (tmp_path / "zero.png").write_bytes(grey_png(np.zeros((0, 5), np.uint8), 8))
    refused(tmp_path / "zero.png")
    (tmp_path / "zero.tif").write_bytes(grey_tiff(np.zeros((3, 0), np.uint8), 8))
    refused(tmp_path / "zero.tif")


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", LABELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    refused(path, "too large", "MAX_IMAGE_PIXELS")


def test_pillow_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", LABELS)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"semeda-fast\[train\]"):
        read_mask(path)


# ----------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_sorted_recursive_and_without_hidden_files(tmp_path: Path) -> None:
    for i, name in enumerate(["b.png", "a/z.PNG", "a/b.tif", "c.bmp", ".hidden.png", ".cache/x.png", "a/.y/z.png"]):
        save(tmp_path / name, LABELS * 0 + i)
    (tmp_path / "notes.txt").write_text("no mask")
    masks = MaskFolder(tmp_path, num_classes=7)
    assert [p.relative_to(tmp_path).as_posix() for p in masks.paths] == [
        "a/b.tif",
        "a/z.PNG",
        "b.png",
        "c.bmp",
    ]
    assert [int(m[0, 0]) for m in (masks[i] for i in range(len(masks)))] == [2, 1, 0, 3]
    assert masks[0].dtype == torch.int64
    assert tuple(masks[-1].shape) == LABELS.shape
    with pytest.raises(IndexError):
        masks[4]


def test_a_folder_inside_a_hidden_one(tmp_path: Path) -> None:
    save(tmp_path / ".data/masks/a.png", LABELS)
    assert len(MaskFolder(tmp_path / ".data/masks")) == 1


def test_items_are_checked_when_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png", LABELS)
    save(tmp_path / "b.png", LABELS + 1)
    masks = MaskFolder(tmp_path, num_classes=4, ignore_index=255)
    assert int(masks[0].max()) == 3
    with pytest.raises(MaskFileError, match=r"b\.png"):
        masks[1]


def test_patterns_and_cityscapes(tmp_path: Path) -> None:
    for ending in ("labelTrainIds", "labelIds", "color", "instanceIds"):
        save(tmp_path / f"aachen/aachen_000_gtFine_{ending}.png", LABELS)
    assert [p.name for p in MaskFolder(tmp_path).paths] == ["aachen_000_gtFine_labelTrainIds.png"]
    assert [p.name for p in MaskFolder(tmp_path, pattern="*_labelIds.png").paths] == ["aachen_000_gtFine_labelIds.png"]
    assert len(MaskFolder(tmp_path, pattern="aachen/*.png")) == 4
    with pytest.raises(FileNotFoundError, match=r"pattern '\*_seg\.png'"):
        MaskFolder(tmp_path, pattern="*_seg.png")


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mask folder .*nowhere does not exist"):
        MaskFolder(tmp_path / "nowhere")
    path = save(tmp_path / "sub/a.png", LABELS)
    with pytest.raises(NotADirectoryError, match=re.escape(str(path)) + " is a file"):
        MaskFolder(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        MaskFolder(tmp_path / "empty")
    assert str(tmp_path / "empty") in str(caught.value)
    assert ".png, .tif" in str(caught.value)
    assert "no files at all" in str(caught.value)
    save(tmp_path / "photos/a.jpg", LABELS)
    with pytest.raises(FileNotFoundError, match=r"1 other file, with \.jpg"):
        MaskFolder(tmp_path / "photos")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    save(tmp_path / "far/a.png", LABELS)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/link").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far/back").symlink_to(tmp_path / "masks", target_is_directory=True)
    assert [p.name for p in MaskFolder(tmp_path / "masks").paths] == ["a.png"]


@pytest.mark.skipif(not CAMVID.exists(), reason="the CamVid masks lie outside the repository and are not here")
def test_camvid() -> None:
    masks = MaskFolder(CAMVID / "masks", num_classes=11, ignore_index=11)
    pairs = pair_files(CAMVID / "images", CAMVID / "masks")
    assert len(masks) == len(pairs) > 50
    image, mask = read_pair(*pairs[0], num_classes=11, ignore_index=11)
    assert image.shape == (*mask.shape, 3)
    assert torch.equal(masks[0], torch.from_numpy(mask).long())
    refused(masks.paths[0], "ignore_index=11", num_classes=11)


# ----------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_by_stem_and_subfolder(tmp_path: Path) -> None:
    for name in ("b", "a/x", "a/y.v2"):
        save(tmp_path / "images" / f"{name}.jpg", LABELS)
        save(tmp_path / "masks" / f"{name}.png", LABELS)
    save(tmp_path / "images/.thumb.jpg", LABELS)
    pairs = pair_files(tmp_path / "images", tmp_path / "masks")
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert pairs == [(images / f"{n}.jpg", masks / f"{n}.png") for n in ("a/x", "a/y.v2", "b")]


def test_pairs_of_cityscapes(tmp_path: Path) -> None:
    save(tmp_path / "leftImg8bit/ulm/ulm_7_19_leftImg8bit.png", LABELS)
    for ending in ("labelTrainIds", "labelIds", "color"):
        save(tmp_path / f"gtFine/ulm/ulm_7_19_gtFine_{ending}.png", LABELS)
    ((image, mask),) = pair_files(str(tmp_path / "leftImg8bit"), str(tmp_path / "gtFine"))
    assert (image.name, mask.name) == ("ulm_7_19_leftImg8bit.png", "ulm_7_19_gtFine_labelTrainIds.png")


def test_mismatches_are_listed_on_both_sides(tmp_path: Path) -> None:
    for i in range(9):
        save(tmp_path / f"images/only{i}.jpg", LABELS)
    for name in ("same.jpg", "other/deep.jpg"):
        save(tmp_path / "images" / name, LABELS)
    for name in ("same.png", "deep.png"):
        save(tmp_path / "masks" / name, LABELS)
    with pytest.raises(ValueError, match="do not match") as caught:
        pair_files(tmp_path / "images", tmp_path / "masks")
    text = str(caught.value)
    assert "10 of 11 images without a mask: only0, only1, only2, only3, only4, and 5 more" in text
    assert "1 of 2 masks without an image: deep" in text
    assert str(tmp_path / "images") in text
    assert str(tmp_path / "masks") in text


def test_a_mismatch_on_one_side_is_enough(tmp_path: Path) -> None:
    for name in ("few/a.png", "many/a.png", "many/b.png"):
        save(tmp_path / name, LABELS)
    with pytest.raises(ValueError, match=r"1 of 2 images without a mask: b\n +0 of 1 masks without an image: none"):
        pair_files(tmp_path / "many", tmp_path / "few")
    with pytest.raises(ValueError, match=r"0 of 1 images without a mask: none\n +1 of 2 masks without an image: b"):
        pair_files(tmp_path / "few", tmp_path / "many")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg", LABELS)
    save(tmp_path / "images/a.png", LABELS)
    save(tmp_path / "masks/a.png", LABELS)
    with pytest.raises(ValueError, match=r"two image files claim the name 'a'.*a\.jpg.*a\.png"):
        pair_files(tmp_path / "images", tmp_path / "masks")


def test_pairs_of_wrong_folders(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg", LABELS)
    with pytest.raises(FileNotFoundError, match="mask folder"):
        pair_files(tmp_path / "images", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image files in .*empty.*\.jpg"):
        pair_files(tmp_path / "empty", tmp_path / "images")


def test_a_pair_is_rgb_and_labels(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    mask_path = save(tmp_path / "m.png", LABELS, "P")
    image, mask = read_pair(save(tmp_path / "rgb.png", colours), mask_path, num_classes=4)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, colours)
    np.testing.assert_array_equal(mask, LABELS)
    assert image.flags.writeable
    rgba = np.concatenate([colours, colours[..., :1]], axis=2)
    np.testing.assert_array_equal(read_pair(save(tmp_path / "rgba.png", rgba), mask_path)[0], colours)
    grey = read_pair(save(tmp_path / "grey.png", LABELS), mask_path)[0]
    np.testing.assert_array_equal(grey, np.repeat(LABELS[..., None], 3, axis=2))
    palette = read_pair(mask_path, mask_path)[0]  # as an image a palette gives its colours
    np.testing.assert_array_equal(palette[..., 0], (37 * LABELS.astype(int)) % 256)
    with pytest.raises(MaskFileError, match=r"m\.png"):
        read_pair(tmp_path / "rgb.png", mask_path, num_classes=3)


def test_sizes_that_differ_name_both_files(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", LABELS)
    mask = save(tmp_path / "mask.png", LABELS[:, :4].copy())
    with pytest.raises(ValueError, match="differ in size") as caught:
        read_pair(image, mask)
    assert f"{image} is 5 x 3" in str(caught.value)
    assert f"{mask} is 4 x 3" in str(caught.value)
    assert "EXIF" not in str(caught.value)
    turned = save(tmp_path / "turned.png", LABELS.T.copy())
    with pytest.raises(ValueError, match="EXIF"):
        read_pair(image, turned)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    mask = save(tmp_path / "mask.png", LABELS)
    deep = tmp_path / "deep.png"
    deep.write_bytes(grey_png(LABELS, 16))
    with pytest.raises(ValueError, match=r"image file .*deep\.png.*8 bits"):
        read_pair(deep, mask)
    (tmp_path / "cut.png").write_bytes(mask.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"image file .*cut\.png") as caught:
        read_pair(tmp_path / "cut.png", mask)
    assert not isinstance(caught.value, MaskFileError)  # the mask is not to blame
    with pytest.raises(FileNotFoundError, match="image file"):
        read_pair(tmp_path / "nowhere.png", mask)
