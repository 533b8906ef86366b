"""Label masks and their images from files.

Palette PNG (Pascal VOC), plain PNG (Cityscapes trainIds, CamVid), TIFF, BMP and GIF, 1 to 16 bits. A mask
file holds one label index per pixel. Everything that would silently change a label is refused: colour-coded
masks, JPEG, alpha channels, float images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from semeda_fast.advice import FILES, Labels, label_advice
from semeda_fast.errors import MaskFileError, missing_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm")
_MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_CITYSCAPES_MASKS = ("_gtFine_labelTrainIds", "_gtCoarse_labelTrainIds")
_CITYSCAPES_IMAGES = ("_leftImg8bit",)
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA", "RGBa")


def read_mask(
    path: str | os.PathLike[str], *, num_classes: int | None = None, ignore_index: int | None = None
) -> NDArray[Any]:
    """Read the label indices of one mask file.

    Palette images give their indices, never their colours. Images of 1, 2 and 4 bits give 0 up to 1, 3, 15.
    No value is changed: void pixels keep the one they have in the file.

    Args:
        path: a PNG, TIFF, BMP or GIF file with one channel.
        num_classes: C; if given, every value must lie in [0, C) or equal `ignore_index`.
        ignore_index: the value of void pixels in the file; None if there are none.

    Returns:
        [H, W] uint8 for up to 8 bits per pixel, int32 for more.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: `path` is a folder.
        MaskFileError: not a readable image, not a mask, or a value that is no label; the text names the file.
        ImportError: Pillow is missing.
    """
    path = Path(path)
    mask = _decode(path, "mask")
    if num_classes is not None:
        _check_values(mask, path, num_classes, ignore_index)
    return mask


def read_pair(
    image_path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Read an image and its mask.

    Args:
        image_path: an 8-bit image; grey, palette and alpha images are converted to RGB (alpha is dropped).
        mask_path, num_classes, ignore_index: as in `read_mask`.

    Returns:
        image: [H, W, 3] uint8 RGB; mask: [H, W] uint8 or int32, as `read_mask` gives it.

    Raises:
        FileNotFoundError, IsADirectoryError, MaskFileError, ImportError: as `read_mask`.
        ValueError: the image cannot be read, or the two differ in size; the text names the files.
    """
    image_path, mask_path = Path(image_path), Path(mask_path)
    image = _decode(image_path, "image")
    mask = read_mask(mask_path, num_classes=num_classes, ignore_index=ignore_index)
    if image.shape[:2] != mask.shape:
        (ih, iw), (mh, mw) = image.shape[:2], mask.shape
        turned = " (one of them is turned by 90 degrees: an EXIF orientation?)" if (ih, iw) == (mw, mh) else ""
        raise ValueError(
            f"image and mask differ in size: {image_path} is {iw} x {ih} pixels (width x height), "
            f"{mask_path} is {mw} x {mh}{turned}; resize the mask with nearest neighbour, "
            "or pair the right files"
        )
    return image, mask


class MaskFolder(Dataset[torch.Tensor]):
    """All mask files of a folder and its subfolders as a Dataset of [H, W] int64 tensors, sorted by path.

    Hidden files and folders (leading dot) are left out. Where Cityscapes' `*_gtFine_labelTrainIds.png` lie
    in the folder, only those are taken, as its other PNGs hold colours and instances; `pattern` chooses.

    Args:
        path: the folder.
        num_classes, ignore_index: as in `read_mask`; checked when an item is read.
        pattern: a glob such as "*_labelIds.png", matched against the end of each path; None takes all.

    Attributes:
        paths: the files, list of Path. Item i is read from paths[i] each time it is asked for.

    Raises:
        FileNotFoundError: the folder is missing or holds no mask file.
        NotADirectoryError: `path` is a file.
        Items raise as `read_mask`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        pattern: str | None = None,
    ) -> None:
        self.paths: list[Path] = _list_files(Path(path), "mask", MASK_EXTENSIONS, pattern)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        mask = read_mask(self.paths[index], num_classes=self.num_classes, ignore_index=self.ignore_index)
        return torch.from_numpy(mask.astype(np.int64))


def pair_files(images_folder: str | os.PathLike[str], masks_folder: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Pair the images of one folder with the masks of another by their path without the extension.

    So `images/a/x.jpg` goes with `masks/a/x.png`. The endings `_leftImg8bit` and `_gtFine_labelTrainIds` of
    Cityscapes are left out of the comparison. Hidden files are left out.

    Returns:
        (image, mask) paths, sorted by name. Sizes are compared by `read_pair`.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder is missing, a file, or empty.
        ValueError: a file has no partner, or two files claim the same name; the text lists the first few.
    """
    images_folder, masks_folder = Path(images_folder), Path(masks_folder)
    images = _by_key(images_folder, "image", IMAGE_EXTENSIONS, _CITYSCAPES_IMAGES)
    masks = _by_key(masks_folder, "mask", MASK_EXTENSIONS, _CITYSCAPES_MASKS)
    only_images, only_masks = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    if only_images or only_masks:
        raise ValueError(
            f"images in {images_folder} and masks in {masks_folder} do not match by name "
            "(path without extension):\n"
            f"  {len(only_images)} of {len(images)} images without a mask: {_first(only_images)}\n"
            f"  {len(only_masks)} of {len(masks)} masks without an image: {_first(only_masks)}\n"
            "give each image and its mask the same name, or move the files without a partner elsewhere"
        )
    return [(images[key], masks[key]) for key in sorted(images)]


# ----------------------------------------------------------------------------------------------------
# Finding files


def _list_files(folder: Path, what: str, extensions: Sequence[str], pattern: str | None = None) -> list[Path]:
    if not folder.exists():
        raise FileNotFoundError(f"{what} folder {folder} does not exist; check the path")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder of {what} files")
    found: list[PurePath] = []
    visited: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        visited.add(os.path.realpath(here))  # a link back to a folder above would never end
        folders[:] = [
            f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(here, f)) not in visited
        ]
        found += [PurePath(here, name).relative_to(folder) for name in files if not name.startswith(".")]
    if pattern is not None:
        chosen = [p for p in found if p.match(pattern)]
    else:
        chosen = [p for p in found if p.suffix.lower() in extensions]
    if not chosen:
        searched = f"pattern {pattern!r}" if pattern is not None else "extensions " + ", ".join(extensions)
        present = sorted({p.suffix or "(no extension)" for p in found})
        inside = (
            f"{len(found)} other file{'s' if len(found) > 1 else ''}, with {_first(present)}"
            if found
            else "no files at all"
        )
        raise FileNotFoundError(f"no {what} files in {folder} or below: searched for {searched}; found {inside}")
    if what == "mask" and pattern is None:
        chosen = [p for p in chosen if p.stem.endswith(_CITYSCAPES_MASKS)] or chosen
    return [folder / p for p in sorted(chosen, key=lambda p: p.as_posix())]


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not read


def _by_key(folder: Path, what: str, extensions: Sequence[str], endings: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _list_files(folder, what, extensions):
        key = path.relative_to(folder).with_suffix("").as_posix()
        for ending in endings:
            key = key.removesuffix(ending)
        if key in files:
            raise ValueError(f"two {what} files claim the name {key!r}: {files[key]} and {path}; keep one of them")
        files[key] = path
    return files


def _first(names: Sequence[str], count: int = 5) -> str:
    listed = ", ".join(names[:count])
    return (listed or "none") + (f", and {len(names) - count} more" if len(names) > count else "")


# ----------------------------------------------------------------------------------------------------
# Reading files


def _decode(path: Path, what: str) -> NDArray[Any]:
    """The pixels of a file: what = "mask" gives [H, W] labels, "image" gives [H, W, 3] uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra(f"reading {what} files", "Pillow", "train") from None
    error = MaskFileError if what == "mask" else ValueError
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a {what} file")
    if not path.exists():
        raise FileNotFoundError(f"{what} file {path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise error(f"{what} file {path} is empty (0 bytes); write it again or remove it")
    with path.open("rb") as file:  # our own open, so that a refused permission is not taken for a broken file
        try:
            with Image.open(file) as image:
                image.load()
                if 0 in image.size:
                    raise ValueError(f"it is {image.width} x {image.height} pixels in size")
                pixels = _labels(image, file, path) if what == "mask" else _rgb(image, path)
        except _Refused as refused:
            raise error(str(refused)) from None
        except Image.UnidentifiedImageError:
            raise error(f"{what} file {path} is not an image in a format that Pillow can read") from None
        except Image.DecompressionBombError as cause:
            raise error(
                f"{what} file {path} is too large: {cause}; cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
            ) from cause
        # Pillow's decoders raise whatever broken bytes lead to: OSError, SyntaxError, struct.error, ...
        except Exception as cause:
            raise error(
                f"cannot read {what} file {path}: {str(cause) or type(cause).__name__}; "
                "it is damaged or cut short, write it again or remove it"
            ) from cause
    return pixels


class _Refused(Exception):
    """A well-formed file of a kind that is not taken; the text is complete."""


def _labels(image: Any, file: BinaryIO, path: Path) -> NDArray[Any]:
    if image.format not in _MASK_FORMATS:
        why = "blends labels along borders" if image.format in ("JPEG", "WEBP", "MPO") else "may rescale its values"
        raise _Refused(
            f"mask file {path} is {image.format}, which {why}; save label indices as PNG "
            f"({', '.join(_MASK_FORMATS)} are read)"
        )
    if getattr(image, "is_animated", False):
        raise _Refused(f"mask file {path} holds {image.n_frames} frames; expected one mask in each file")
    if image.mode in _COLOUR_MODES:
        raise _Refused(_colour_refusal(image, path))
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise _Refused(f"mask file {path} has mode {image.mode}; expected integers in one channel (modes 1, L, P, I)")
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:
        raise _Refused(
            f"mask file {path} stores white as zero (TIFF photometric 0), so readers invert its labels; save it as PNG"
        )
    pixels = np.array(image)  # a copy: asarray's result would be read-only, which torch warns of
    if image.mode == "L":
        # Pillow stretches 2- and 4-bit grey to 0..255 (by 85 and 17); undo that to get the stored labels.
        bits = _bits_per_sample(image, file)
        return pixels // (255 // (2**bits - 1)) if bits in (2, 4) else pixels
    if image.mode in ("1", "P"):
        return pixels.astype(np.uint8)
    return pixels.astype(np.int32)


def _bits_per_sample(image: Any, file: BinaryIO) -> int:
    if image.format == "TIFF":
        return int(image.tag_v2.get(258, (8,))[0])
    if image.format == "PNG":  # IHDR is always first: 8 bytes signature, 8 of chunk header, width, height, bit depth
        file.seek(24)
        return file.read(1)[0]
    return 8


def _colour_refusal(image: Any, path: Path) -> str:
    bands = len(image.getbands())
    text = f"mask file {path} has mode {image.mode} ({bands} channels); expected one channel of label indices. "
    if image.mode in ("LA", "La", "PA"):
        return text + "Save it without its alpha channel"
    if image.mode.startswith("RGB"):
        pixels = np.asarray(image)
        if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2]):
            return text + "Its channels are equal: save one of them as an 8-bit grey PNG"
    return text + (
        "Convert colour-coded masks to label indices first (one index for each colour), and check that this "
        'is not the folder of the images; in Python MaskFolder(..., pattern="...") takes some files of a folder only'
    )


def _rgb(image: Any, path: Path) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        raise _Refused(
            f"image file {path} has mode {image.mode}, more than 8 bits per channel; convert it to 8 bits first"
        )
    return np.array(image.convert("RGB"))


def _check_values(mask: NDArray[Any], path: Path, num_classes: int, ignore_index: int | None) -> None:
    wrong = (mask < 0) | (mask >= num_classes)
    if ignore_index is not None:
        wrong &= mask != ignore_index
    if not wrong.any():
        return
    values, counts = np.unique(mask[wrong], return_counts=True)
    seen = Labels(np.unique(mask).tolist(), values.tolist(), num_classes, ignore_index, FILES)
    listed = _first([f"{v} ({n} pixel{'s' if n > 1 else ''})" for v, n in zip(values, counts, strict=True)])
    allowed = f"0 to {num_classes - 1}" + (f" or ignore_index={ignore_index}" if ignore_index is not None else "")
    raise MaskFileError(
        f"mask file {path} holds values that are no labels: {listed}; expected {allowed} "
        f"(num_classes={num_classes}). {label_advice(seen)}."
    )
