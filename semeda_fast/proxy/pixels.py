"""The pixels of one file: labels of a mask, colours of an image.

Pillow decodes. What it reads otherwise than the file says (its version 13.0 was looked at) is put right here where
that is exact, and refused where it is not, or where two readings of the same file are both usual.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from semeda_fast.errors import MaskFileError, missing_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA", "RGBa")
_ALPHA_MODES = ("LA", "La", "PA")
_LOSSY_FORMATS = ("JPEG", "WEBP", "MPO", "AVIF", "JPEG2000")
# TIFF tags, and the compressions (tag 259) that give back what was stored: none, fax, LZW, Deflate, PackBits, ...
_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = 258, 259, 262, 274, 277, 284, 339
_BYTE_COUNTS, _OFFSETS = (279, 325), (273, 324)
_LOSSLESS = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000)
_JPEG = (6, 7)
_UNSIGNED, _SIGNED, _FLOATS = 1, 2, 3
_AS_PNG = "save the labels as a grey or palette PNG"


class _Refused(Exception):
    """A well-formed file of a kind that is not taken; the text goes on after "mask file <path> "."""


def decode(path: Path, what: str) -> NDArray[Any]:
    """The pixels of a file: what = "mask" gives [H, W] labels, "image" gives [H, W, 3] uint8.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: of the path.
        MaskFileError (for an image ValueError): it cannot be read, or not for certain; the text names the file.
        MissingExtraError: Pillow is missing.
    """
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
            with _whole_files.only() if what == "mask" else nullcontext():
                pixels = _labels(file) if what == "mask" else _rgb(file)
        except _Refused as refused:
            raise error(f"{what} file {path} {refused}") from None
        except Image.UnidentifiedImageError:
            raise error(
                f"{what} file {path} is not an image in a format that Pillow can read; "
                + (_AS_PNG if what == "mask" else "save it as PNG or JPEG")
            ) from None
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


class _WholeFiles:
    """While any thread is inside, Pillow's LOAD_TRUNCATED_IMAGES is off.

    Many scripts set it for their photographs. In a mask it would fill what is missing with class 0.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.wanted = threading.Lock(), 0, False

    @contextmanager
    def only(self) -> Iterator[None]:
        from PIL import ImageFile

        with self.lock:
            if self.inside == 0:
                self.wanted, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self.wanted


_whole_files = _WholeFiles()


def _labels(file: BinaryIO) -> NDArray[Any]:
    from PIL import Image

    with Image.open(_without_a_grey_palette(file)) as image:
        if 0 in image.size:
            raise ValueError(f"it is {image.width} x {image.height} pixels in size")
        if image.format not in MASK_FORMATS:
            why = "blends labels along borders" if image.format in _LOSSY_FORMATS else "may rescale its values"
            raise _Refused(f"is {image.format}, which {why}; {_AS_PNG} ({', '.join(MASK_FORMATS)} are read)")
        if getattr(image, "is_animated", False):
            raise _Refused(f"holds {image.n_frames} frames; expected one mask in each file")
        if image.format == "TIFF":
            _check_tiff(image)
        if image.format == "GIF" and image.tile[0][1] != (0, 0, *image.size):
            raise _Refused(f"has a frame that covers a part of the picture only; {_AS_PNG}")
        if image.format == "PNG":
            _check_png(image, file)
        if image.mode in _COLOUR_MODES:
            raise _Refused(_about_colours(image))
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise _Refused(f"has mode {image.mode}; expected integers in one channel (modes 1, L, P, I)")
        _check_orientation(_orientation(image))
        image.load()
        _check_orientation(_orientation(image))  # in a PNG it may follow the pixels
        pixels = np.array(image)  # a copy: asarray's result would be read-only, which torch warns of
        if image.format == "GIF":
            _check_gif(image, pixels)
        if image.mode == "L":
            # Pillow stretches 2- and 4-bit grey to 0..255 (by 85 and 17); undo that to get the stored labels.
            bits = _bits_per_sample(image, file)
            pixels = pixels // (255 // (2**bits - 1)) if bits in (2, 4) else pixels
        return _of_their_sign(pixels, image)


def _of_their_sign(pixels: NDArray[Any], image: Any) -> NDArray[Any]:
    """Labels as uint8 or int32, or int64 where these are too narrow."""
    if image.format == "TIFF":
        kind = _first_of(image.tag_v2.get(_SAMPLE_FORMAT, _UNSIGNED))
        if kind == _SIGNED and pixels.dtype == np.uint8:
            pixels = pixels.view(np.int8)
        if kind == _UNSIGNED and pixels.dtype == np.int32:
            pixels = pixels.view(np.uint32)
    if pixels.dtype in (np.bool_, np.uint8):
        return pixels.astype(np.uint8)
    narrow = pixels.dtype != np.uint32 or not (pixels > np.iinfo(np.int32).max).any()
    return pixels.astype(np.int32 if narrow else np.int64)


def _bits_per_sample(image: Any, file: BinaryIO) -> int:
    if image.format == "TIFF":
        return int(image.tag_v2.get(_BITS, (1,))[0])
    return _png_header(file)[0] if image.format == "PNG" else 8


# ----------------------------------------------------------------------------------------------------
# What each format may hold


def _check_tiff(image: Any) -> None:
    """Refuse what Pillow decodes to other numbers than are stored."""
    tags = image.tag_v2
    compression, photometric = tags.get(_COMPRESSION, 1), tags.get(_PHOTOMETRIC)
    kind = _first_of(tags.get(_SAMPLE_FORMAT, _UNSIGNED))
    codec, _, _, arguments = image.tile[0]
    if compression not in _LOSSLESS:
        how = "with JPEG, which blends labels along borders" if compression in _JPEG else "in a way that may lose some"
        raise _Refused(f"compresses its labels {how} (TIFF compression {compression}); {_AS_PNG} from their source")
    bits, samples = tags.get(_BITS, (1,))[0], tags.get(_SAMPLES, 1)
    apart = tags.get(_PLANAR, 1) == 2 and image.mode in _ALPHA_MODES  # one after the other, which Pillow cannot read
    if image.mode in _COLOUR_MODES and not apart:
        if bits > 8:
            raise _Refused(_about_wide_channels(bits, f"mode {image.mode}"))
        return
    if samples != 1:
        raise _Refused(
            f"holds {samples} channels, of which Pillow reads one at most; expected one channel of label "
            f"indices: {_AS_PNG}, or as a TIFF of that channel alone"
        )
    if kind == _FLOATS:
        raise _Refused(
            "holds floating-point numbers (mode F); expected integers: save them as such, in Python "
            "Image.fromarray(labels.astype(np.uint8)).save('mask.png')"
        )
    if photometric == 0:
        raise _Refused(
            "stores white as zero (TIFF photometric 0), so some readers invert its labels and some do not; "
            "write the labels again as PNG or with photometric 1 (min-is-black)"
        )
    if photometric not in (1, 3):
        named = "no photometric tag (262)" if photometric is None else f"photometric {photometric}"
        raise _Refused(
            f"has {named}, so readers differ in what its numbers mean; write the labels again as PNG or with "
            "photometric 1 (min-is-black)"
        )
    if any(0 in _all_of(tags.get(tag, 1)) for tag in (*_BYTE_COUNTS, *_OFFSETS)):
        raise _Refused(
            "leaves out some of its strips or tiles (a sparse TIFF), which Pillow would fill with other bytes of the "
            "file; write it again in full, with GDAL by -co SPARSE_OK=FALSE"
        )
    # libtiff gives numbers in the processor's byte order; Pillow takes signed ones to be in the file's.
    if codec == "libtiff" and kind == _SIGNED and str(arguments[0]).endswith("BS"):
        raise _Refused(
            "holds signed integers that are big-endian and compressed, which Pillow reads with swapped bytes; write it "
            "again little-endian, uncompressed, or as PNG"
        )


def _check_png(image: Any, file: BinaryIO) -> None:
    bits, colour = _png_header(file)
    if bits == 16 and colour in (2, 4, 6):
        channels = {2: "red, green, blue", 4: "grey and alpha", 6: "red, green, blue and alpha"}[colour]
        raise _Refused(_about_wide_channels(bits, channels))


def _png_header(file: BinaryIO) -> tuple[int, int]:
    """Bit depth and colour type. IHDR is always first: 8 bytes signature, 8 of chunk header, width, height, these."""
    at = file.tell()
    file.seek(24)
    bits, colour = file.read(2)
    file.seek(at)
    return bits, colour


def _check_gif(image: Any, pixels: NDArray[Any]) -> None:
    """Writers of GIF number the colours in use anew: an index is the label only where its colour says the same."""
    if image.mode == "L":  # what Pillow calls a palette that maps each index to the grey of its number
        return
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(pixels)
    used = used[used < len(palette)]
    if not (palette[used] == used[:, None]).all():
        raise _Refused(
            "is a GIF with a colour table, and what writes such files gives new numbers to the labels; save the labels "
            "as a grey or palette PNG, from their source"
        )


def _without_a_grey_palette(file: BinaryIO) -> BinaryIO:
    """The file, but for a BMP with a palette, whose colours are replaced by ones that are not grey.

    Labels are its indices, whatever their colours. A palette that looks grey is left aside by Pillow, which then
    reads 4- and 8-bit indices with two colours as single bits, and fails on 4-bit ones with a ramp.
    """
    head = file.read(30)
    file.seek(0)
    if head[:2] != b"BM" or len(head) < 30:
        return file
    size = int.from_bytes(head[14:18], "little")
    bits = int.from_bytes(head[24:26] if size == 12 else head[28:30], "little")
    if bits not in (1, 2, 4, 8):
        return file
    data = bytearray(file.read())
    first = 14 + size
    data[first : first + 3] = b"\1\2\3"
    file.seek(0)
    return io.BytesIO(data)


# ----------------------------------------------------------------------------------------------------
# Orientation and colours


def _orientation(image: Any) -> int:
    """How viewers turn an image, 1 to 8; 1 is as stored."""
    return int(image.getexif().get(_ORIENTATION, 1))


def _check_orientation(orientation: int) -> None:
    # The advice opens a file, not a path: by its path Pillow 13.0 maps an uncompressed TIFF and mixes up its pixels.
    if orientation in range(2, 9):
        raise _Refused(
            f"says that viewers shall turn it (EXIF orientation {orientation}), and some readers do so and some do "
            "not. Save it without that; what viewers show is, in Python, "
            "ImageOps.exif_transpose(Image.open(open(path, 'rb'))).save('upright.png')"
        )


def _about_wide_channels(bits: int, channels: str) -> str:
    return (
        f"has {bits} bits in each of its channels ({channels}), of which Pillow keeps the upper 8; expected one "
        "channel of label indices. Read it with cv2.imread(path, cv2.IMREAD_UNCHANGED) and save the channel that holds "
        "the labels as a grey PNG"
    )


def _about_colours(image: Any) -> str:
    bands = len(image.getbands())
    text = f"has mode {image.mode} ({bands} channels); expected one channel of label indices. "
    if image.mode in _ALPHA_MODES:
        return text + "Save it without its alpha channel, in Python Image.open(path).getchannel(0).save('mask.png')"
    if image.mode.startswith("RGB"):
        pixels = np.asarray(image)
        if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2]):
            return text + (
                "Its channels are equal: save one of them as an 8-bit grey PNG, in Python "
                "Image.open(path).getchannel(0).save('mask.png')"
            )
    return text + (
        "Convert colour-coded masks to label indices first (one index for each colour), and check that this "
        'is not the folder of the images; MaskFolder(..., pattern="...") and --pattern take some files of a folder only'
    )


def _rgb(file: BinaryIO) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(file) as image:
        if 0 in image.size:
            raise ValueError(f"it is {image.width} x {image.height} pixels in size")
        orientation = _orientation(image)
        # Pillow turns TIFFs and nothing else. Where width and height change places, the size tells which one fits.
        if image.format == "TIFF" or orientation < 5 or image.width == image.height:
            _check_orientation(orientation)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            raise _Refused(f"has mode {image.mode}, more than 8 bits per channel; convert it to 8 bits first")
        return np.array(image.convert("RGB"))


def _all_of(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _first_of(value: Any) -> Any:
    return _all_of(value)[0]
