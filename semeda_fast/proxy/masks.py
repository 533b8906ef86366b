"""Label masks and their images from files and folders.

Palette PNG (Pascal VOC), plain PNG (Cityscapes trainIds, CamVid), TIFF, BMP and some GIFs, 1 to 32 bits. A mask
file holds one label index per pixel. Everything that could silently change a label is refused: colour-coded
masks, JPEG, alpha channels, floats, and files that readers understand in more than one way (pixels.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from semeda_fast.advice import FILES, Labels, label_advice
from semeda_fast.errors import MaskFileError
from semeda_fast.plain import whole_number

from .pixels import decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm")
_CITYSCAPES_MASKS = ("_gtFine_labelTrainIds", "_gtCoarse_labelTrainIds")
_CITYSCAPES_IMAGES = ("_leftImg8bit",)


def read_mask(
    path: str | os.PathLike[str], *, num_classes: int | None = None, ignore_index: int | None = None
) -> NDArray[Any]:
    """Read the label indices of one mask file.

    Palette images give their indices, never their colours. Images of 1, 2 and 4 bits give 0 up to 1, 3, 15.
    No value is changed: void pixels keep the one they have in the file.

    Args:
        path: a PNG, TIFF, BMP or GIF file with one channel. Where readers differ in what a file says, it is refused:
            white stored as zero, an orientation other than upright, JPEG in a TIFF, a GIF with a colour table.
        num_classes: C; if given, every value must lie in [0, C) or equal `ignore_index`.
        ignore_index: the value of void pixels in the file; None if there are none.

    Returns:
        [H, W] uint8 for up to 8 bits per pixel without a sign, else int32 (int64 for numbers of 2^31 and more).

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: `path` is a folder.
        MaskFileError: not a readable image, not a mask, or a value that is no label; the text names the file.
        ImportError: Pillow is missing.
    """
    path = Path(path)
    if num_classes is not None:
        num_classes = whole_number("num_classes", num_classes)
    mask = decode(path, "mask")
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
        image_path: an 8-bit image; grey, palette and alpha images are converted to RGB (alpha is dropped). It is read
            as stored, not as an EXIF orientation turns it, and refused where its size cannot tell these apart.
        mask_path, num_classes, ignore_index: as in `read_mask`.

    Returns:
        image: [H, W, 3] uint8 RGB; mask: [H, W] as `read_mask` gives it.

    Raises:
        FileNotFoundError, IsADirectoryError, MaskFileError, ImportError: as `read_mask`.
        ValueError: the image cannot be read, or the two differ in size; the text names the files.
    """
    image_path, mask_path = Path(image_path), Path(mask_path)
    image = decode(image_path, "image")
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
        pattern: a glob such as `*_labelIds.png`, matched against the end of each path; None takes all.

    Attributes:
        paths: the files, list of Path. Item i is read from paths[i] each time it is asked for.
        description: folder and pattern in words, for a proxy's provenance.

    Raises:
        FileNotFoundError: the folder is missing or holds no mask file.
        NotADirectoryError: `path` is a file.
        MaskFileError: reading an item, as `read_mask` does.
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
        self.num_classes = None if num_classes is None else whole_number("num_classes", num_classes)
        self.ignore_index = None if ignore_index is None else whole_number("ignore_index", ignore_index)
        self.description = describe_folder(path) + (f", pattern {pattern!r}" if pattern is not None else "")

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


def describe_folder(path: str | os.PathLike[str]) -> str:
    """A folder by its last two names, not by its full path."""
    return "folder " + "/".join(os.path.normpath(os.path.abspath(path)).split(os.sep)[-2:])


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
# Values


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
