"""Mask files of every kind that readers understand in more than one way: the labels stored, or an error that helps.

The files are written by `mask_writers.py`, which shares no code with what reads them.
"""

from __future__ import annotations

import re
import threading
import zlib
from pathlib import Path

import mask_writers as write
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from semeda_fast.errors import MaskFileError
from semeda_fast.proxy.masks import MaskFolder, read_mask, read_pair

LABELS = np.array([[0, 1, 2, 3, 3], [2, 2, 1, 0, 0], [3, 1, 1, 1, 2]], np.uint8)  # no multiple of 8 wide
SIGNED = LABELS.astype(np.int64) - 1
BITS = LABELS % 2
TWO = np.stack([LABELS, LABELS[::-1]], axis=-1)
RAMP = np.repeat(np.arange(256)[:, None], 3, axis=1)
COLOURS = np.random.default_rng(0).permutation(256 * 3).reshape(256, 3) % 251


def unsigned(labels: np.ndarray, bits: int) -> np.ndarray:
    """Signed labels as the unsigned numbers with the same bits."""
    return labels % 2**bits


def mirrored(data: bytes) -> bytes:
    """Each byte with its lowest bit first: TIFF's fill order 2."""
    return bytes(int(format(byte, "08b")[::-1], 2) for byte in data)


def differences(data: bytes) -> bytes:
    """TIFF's predictor 2 on rows of LABELS' width, deflated."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, LABELS.shape[1])
    return zlib.compress(np.diff(rows, axis=1, prepend=np.uint8(0)).tobytes())


def palette_tags(entries: int) -> dict[int, object]:
    return {262: 3, 320: (COLOURS[:entries] * 257).T.ravel().tolist()}


# Name -> the file, and the labels that its writer meant.
READ: dict[str, tuple[bytes, np.ndarray]] = {
    "int8.tif": (write.tiff(unsigned(SIGNED, 8), 8, tags={339: 2}), SIGNED),
    "int8-big-endian.tif": (write.tiff(unsigned(SIGNED, 8), 8, order=">", tags={339: 2}), SIGNED),
    "int16.tif": (write.tiff(unsigned(SIGNED, 16), 16, tags={339: 2}), SIGNED),
    "int16-big-endian.tif": (write.tiff(unsigned(SIGNED, 16), 16, order=">", tags={339: 2}), SIGNED),
    "int32-deflate.tif": (
        write.tiff(unsigned(SIGNED, 32), 32, tags={339: 2, 259: 8}, encode=zlib.compress),
        SIGNED,
    ),
    "uint32.tif": (write.tiff(LABELS, 32), LABELS),
    "uint32-large.tif": (write.tiff(SIGNED + 2**32 - 3, 32), SIGNED + 2**32 - 3),
    "uint32-deflate.tif": (
        write.tiff(SIGNED + 2**31, 32, tags={259: 8}, encode=zlib.compress),
        SIGNED + 2**31,
    ),
    "uint16-big-endian.tif": (write.tiff(SIGNED * 257 + 257, 16, order=">"), SIGNED * 257 + 257),
    "uint16-big-endian-deflate.tif": (
        write.tiff(SIGNED * 20000 + 20000, 16, order=">", tags={259: 8}, encode=zlib.compress),
        SIGNED * 20000 + 20000,
    ),
    "twelve-bits.tif": (write.tiff(SIGNED * 1000 + 1000, 12), SIGNED * 1000 + 1000),
    "strips.tif": (write.tiff(LABELS, 8, rows_per_strip=2), LABELS),
    "predictor.tif": (write.tiff(LABELS, 8, tags={259: 8, 317: 2}, encode=differences), LABELS),
    "fill-order.tif": (write.tiff(LABELS, 4, tags={266: 2}, encode=mirrored), LABELS),
    "one-bit.png": (write.png(BITS, 1), BITS),
    "one-bit.tif": (write.tiff(BITS, 1), BITS),
    "one-bit-fill-order.tif": (write.tiff(BITS, 1, tags={266: 2}, encode=mirrored), BITS),
    "one-bit-transparent.png": (write.png(BITS, 1, before=[(b"tRNS", b"\0\1")]), BITS),
    "two-bits-transparent.png": (write.png(LABELS, 2, before=[(b"tRNS", b"\0\1")]), LABELS),
    "grey-transparent.png": (write.png(LABELS, 8, before=[(b"tRNS", b"\0\1")]), LABELS),
    "deep-transparent.png": (write.png(SIGNED + 300, 16, before=[(b"tRNS", b"\0\1")]), SIGNED + 300),
    "palette-transparent.png": (
        write.png(LABELS, 8, colour=3, palette=COLOURS, before=[(b"tRNS", bytes([255, 0, 128]))]),
        LABELS,
    ),
    "gamma.png": (write.png(LABELS, 8, before=[(b"gAMA", (45455).to_bytes(4, "big")), (b"sBIT", b"\2")]), LABELS),
    "orientation-1.png": (write.png(LABELS, 8, before=[(b"eXIf", write.exif(1))]), LABELS),
    "grey-ramp.gif": (write.gif(LABELS, RAMP[:4]), LABELS),
    "grey-ramp-256.gif": (write.gif(LABELS * 85, RAMP), LABELS * 85),
    "unused-colours.gif": (write.gif(LABELS, np.concatenate([RAMP[:4], COLOURS[4:8]])), LABELS),
    **{
        f"interlaced-{bits}.png": (
            write.png(LABELS % 2 ** min(bits, 7), bits, interlaced=True),
            LABELS % 2 ** min(bits, 7),
        )
        for bits in (1, 2, 4, 8, 16)
    },
    **{
        f"interlaced-palette-{bits}.png": (
            write.png(LABELS % 2 ** min(bits, 7), bits, colour=3, palette=COLOURS[: 2**bits], interlaced=True),
            LABELS % 2 ** min(bits, 7),
        )
        for bits in (1, 2, 4, 8)
    },
    **{
        f"palette-{bits}.tif": (
            write.tiff(LABELS % 2 ** min(bits, 7), bits, tags=palette_tags(2**bits)),
            LABELS % 2 ** min(bits, 7),
        )
        for bits in (1, 2, 4, 8)
    },
    **{
        f"{name}-{bits}-{'down' if top_down else 'up'}.bmp": (
            write.bmp(labels, bits, palette[: 2**bits], top_down=top_down),
            labels,
        )
        for bits in (1, 4, 8)
        for top_down in (False, True)
        for name, labels, palette in (
            ("ramp", BITS if bits == 1 else LABELS, RAMP),
            ("colours", BITS if bits == 1 else LABELS, COLOURS),
            ("black-white", BITS, RAMP[[0, 255]]),
            ("white-black", BITS, RAMP[[255, 0]]),
        )
    },
}


@pytest.mark.parametrize("name", READ)
def test_the_labels_that_were_written(tmp_path: Path, name: str) -> None:
    data, expected = READ[name]
    path = tmp_path / name
    path.write_bytes(data)
    mask = read_mask(path)
    assert mask.dtype in (np.uint8, np.int32, np.int64)
    assert mask.flags.writeable
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(MaskFolder(tmp_path)[0].numpy(), expected)


def test_the_narrowest_dtype_that_holds_them(tmp_path: Path) -> None:
    for name, dtype in {
        "one-bit.png": np.uint8,
        "black-white-8-up.bmp": np.uint8,
        "int8.tif": np.int32,
        "uint32.tif": np.int32,
        "uint32-large.tif": np.int64,
    }.items():
        (tmp_path / name).write_bytes(READ[name][0])
        assert read_mask(tmp_path / name).dtype == dtype, name


def test_void_at_the_end_of_32_bits(tmp_path: Path) -> None:
    labels = np.where(LABELS == 3, 2**32 - 1, LABELS.astype(np.int64))
    (tmp_path / "void.tif").write_bytes(write.tiff(labels, 32))
    np.testing.assert_array_equal(read_mask(tmp_path / "void.tif", num_classes=3, ignore_index=2**32 - 1), labels)


# Name -> the file, and words of the refusal.
REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "second-band.tif": (write.tiff(TWO, 8, tags={338: [0]}), ["2 channels"]),
    "second-band-big-endian.tif": (write.tiff(TWO, 8, order=">", tags={338: [0]}), ["2 channels"]),
    "second-band-palette.tif": (write.tiff(TWO, 8, tags={338: [0], **palette_tags(256)}), ["2 channels"]),
    "second-band-planar.tif": (write.tiff(TWO.astype(int) + 300, 16, planar=2, tags={338: [0]}), ["2 channels"]),
    "alpha-planar.tif": (write.tiff(TWO, 8, planar=2, tags={338: [2]}), ["2 channels"]),
    "alpha.tif": (write.tiff(TWO, 8, tags={338: [2]}), ["alpha", "getchannel(0)"]),
    "alpha-palette.tif": (write.tiff(TWO, 8, tags={338: [2], **palette_tags(256)}), ["alpha", "getchannel(0)"]),
    "alpha.png": (write.png(TWO, 8, colour=4), ["alpha", "getchannel(0)"]),
    "alpha-16.png": (write.png(TWO.astype(int) + 300, 16, colour=4), ["16 bits", "grey and alpha", "upper 8"]),
    "rgb-16.png": (write.png(np.repeat(SIGNED[..., None] + 300, 3, axis=2), 16, colour=2), ["16 bits", "upper 8"]),
    "rgb-16.tif": (
        write.tiff(np.repeat(SIGNED[..., None] + 300, 3, axis=2), 16, tags={262: 2}),
        ["16 bits", "upper 8"],
    ),
    "float32.tif": (write.tiff(LABELS.astype(np.float32).view(np.uint32), 32, tags={339: 3}), ["floating-point"]),
    "float64.tif": (write.tiff(LABELS.astype(np.float64).view(np.uint64), 64, tags={339: 3}), ["PNG"]),
    "uint64.tif": (write.tiff(LABELS, 64), ["PNG"]),
    "uint32-big-endian.tif": (write.tiff(LABELS, 32, order=">"), ["PNG"]),
    "swapped-int16.tif": (
        write.tiff(unsigned(SIGNED, 16), 16, order=">", tags={339: 2, 259: 8}, encode=zlib.compress),
        ["big-endian", "little-endian"],
    ),
    "swapped-int32.tif": (
        write.tiff(unsigned(SIGNED, 32), 32, order=">", tags={339: 2, 259: 8}, encode=zlib.compress),
        ["big-endian", "little-endian"],
    ),
    "pages.tif": (write.tiff(LABELS, 8, pages=2), ["2 frames"]),
    "luminance.tif": (write.tiff(LABELS, 8, tags={262: 6}), ["photometric 6", "photometric 1"]),
    "colours.gif": (write.gif(LABELS, COLOURS[:4]), ["GIF", "PNG"]),
    "greys.gif": (write.gif(LABELS, RAMP[[0, 3, 7, 9]]), ["GIF", "PNG"]),
    "part.gif": (write.gif(LABELS, RAMP[:4], screen=(8, 6), corner=(2, 1)), ["part of the picture"]),
    "late-exif.png": (write.png(LABELS, 8, after=[(b"eXIf", write.exif(3))]), ["orientation 3"]),
    **{
        f"white-{bits}.tif": (write.tiff(LABELS % 2 ** min(bits, 7), bits, tags={262: 0}), ["photometric 0", "invert"])
        for bits in (1, 2, 4, 8, 16)
    },
    **{
        f"no-photometric-{bits}.tif": (
            write.tiff(LABELS % 2 ** min(bits, 7), bits, without=[262]),
            ["no photometric tag", "photometric 1"],
        )
        for bits in (1, 2, 4, 8, 16)
    },
    **{
        f"turned-{orientation}.tif": (write.tiff(LABELS, 8, tags={274: orientation}), [f"orientation {orientation}"])
        for orientation in range(2, 9)
    },
    **{
        f"turned-{orientation}.png": (
            write.png(LABELS, 8, before=[(b"eXIf", write.exif(orientation))]),
            [f"orientation {orientation}"],
        )
        for orientation in range(2, 9)
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_names_the_file_and_the_remedy(tmp_path: Path, name: str) -> None:
    data, words = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(MaskFileError, match=re.escape(str(path))) as caught:
        read_mask(path)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert "damaged" not in text


def refusal(path: Path) -> str:
    with pytest.raises(MaskFileError) as caught:
        read_mask(path)
    return str(caught.value)


def test_a_jpeg_in_a_tiff(tmp_path: Path) -> None:
    """Pillow alone writes these here: its labels come back changed, which shows that the refusal is needed."""
    labels = np.kron(LABELS, np.ones((11, 13), np.uint8))
    path = tmp_path / "jpeg.tif"
    Image.fromarray(labels).save(path, compression="jpeg", quality=95)
    with Image.open(path) as image:
        assert (np.asarray(image) != labels).any()
    text = refusal(path)
    assert "JPEG" in text
    assert "PNG" in text


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"])
def test_tiffs_that_lose_nothing(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "lossless.tif"
    Image.fromarray(LABELS).save(path, compression=compression)
    np.testing.assert_array_equal(read_mask(path), LABELS)


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
def test_fax_tiffs_lose_nothing(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "fax.tif"
    Image.fromarray(BITS.astype(bool)).save(path, compression=compression)
    np.testing.assert_array_equal(read_mask(path), BITS)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_gif_that_pillow_wrote(tmp_path: Path, mode: str) -> None:
    """Labels 0, 3, 7, 9 are stored as 0, 1, 2, 3: what was meant cannot be told."""
    image = Image.fromarray(np.array([0, 3, 7, 9], np.uint8)[LABELS])
    if mode == "P":
        image.putpalette(COLOURS.astype(np.uint8).tobytes())
    image.save(tmp_path / "renumbered.gif")
    with Image.open(tmp_path / "renumbered.gif") as written:
        np.testing.assert_array_equal(np.asarray(written), LABELS)
    assert "new numbers" in refusal(tmp_path / "renumbered.gif")


def sparse_tiff(**options: object) -> bytes:
    """A TIFF whose second strip is not stored, as GDAL writes one that is zero throughout."""
    data = bytearray(write.tiff(LABELS, 8, rows_per_strip=1, **options))  # type: ignore[arg-type]
    start = int.from_bytes(data[4:8], "little")
    for number in range(int.from_bytes(data[start : start + 2], "little")):
        entry = start + 2 + 12 * number
        if int.from_bytes(data[entry : entry + 2], "little") in (273, 279):
            second = int.from_bytes(data[entry + 8 : entry + 12], "little") + 4
            data[second : second + 4] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"tags": {259: 8}, "encode": zlib.compress}], ids=["raw", "deflate"])
def test_a_sparse_tiff(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "sparse.tif"
    path.write_bytes(sparse_tiff(**options))
    text = refusal(path)
    assert "sparse" in text
    assert "damaged" not in text


# ----------------------------------------------------------------------------------------------------
# Settings of Pillow that a script made for its photographs


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_a_file_that_is_cut_short_while_truncated_images_are_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    labels = np.random.default_rng(0).integers(1, 4, (64, 64))
    data = write.png(labels) if kind == "png" else write.bmp(labels, 8, RAMP)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: len(data) * 2 // 3])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "cut short" in refusal(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    image, _ = read_pair(path, save(tmp_path / "whole.png", labels))  # as they asked for, of an image
    assert image.shape == (64, 64, 3)


def test_the_setting_is_kept_apart_from_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread reads a mask while another ends: the first must not go on with the setting put back."""
    labels = np.random.default_rng(0).integers(1, 4, (64, 64))
    cut = tmp_path / "cut.png"
    cut.write_bytes(write.png(labels)[:-300])
    whole = save(tmp_path / "whole.png", labels)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    read: list[str] = []

    def many(path: Path) -> None:
        for _ in range(40):
            try:
                read_mask(path)
                read.append(path.name)
            except MaskFileError:
                pass

    threads = [threading.Thread(target=many, args=(path,)) for path in (cut, whole, cut, whole)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == ["whole.png"] * 80
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# ----------------------------------------------------------------------------------------------------
# Following the advice works


def save(path: Path, labels: np.ndarray) -> Path:
    Image.fromarray(labels.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["alpha.png", "alpha.tif", "alpha-palette.tif"])
def test_advice_to_take_the_first_channel(tmp_path: Path, name: str) -> None:
    path, mask = tmp_path / name, tmp_path / "mask.png"
    path.write_bytes(REFUSED[name][0])
    assert "Image.open(path).getchannel(0).save('mask.png')" in refusal(path)
    Image.open(path).getchannel(0).save(mask)
    np.testing.assert_array_equal(read_mask(mask), LABELS)


def test_advice_for_channels_that_are_equal(tmp_path: Path) -> None:
    path, mask = tmp_path / "rgb.png", tmp_path / "mask.png"
    path.write_bytes(write.png(np.repeat(LABELS[..., None], 3, axis=2), 8, colour=2))
    assert "Image.open(path).getchannel(0).save('mask.png')" in refusal(path)
    Image.open(path).getchannel(0).save(mask)
    np.testing.assert_array_equal(read_mask(mask), LABELS)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_advice_to_turn_it(tmp_path: Path, kind: str, orientation: int) -> None:
    path, upright = tmp_path / f"turned.{kind}", tmp_path / "upright.png"
    path.write_bytes(REFUSED[f"turned-{orientation}.{kind}"][0])
    assert "ImageOps.exif_transpose(Image.open(open(path, 'rb'))).save('upright.png')" in refusal(path)
    with open(path, "rb") as file:
        ImageOps.exif_transpose(Image.open(file)).save(upright)
    shown = {2: LABELS[:, ::-1], 3: LABELS[::-1, ::-1], 6: LABELS[::-1].T}[orientation]
    np.testing.assert_array_equal(read_mask(upright), shown)


def test_advice_for_floats(tmp_path: Path) -> None:
    path, mask = tmp_path / "float32.tif", tmp_path / "mask.png"
    path.write_bytes(REFUSED["float32.tif"][0])
    assert "Image.fromarray(labels.astype(np.uint8)).save('mask.png')" in refusal(path)
    labels = np.asarray(Image.open(path))
    Image.fromarray(labels.astype(np.uint8)).save(mask)
    np.testing.assert_array_equal(read_mask(mask), LABELS)


# ----------------------------------------------------------------------------------------------------
# Images beside masks


def test_an_image_that_fits_its_mask_both_turned_and_not(tmp_path: Path) -> None:
    """Pillow turns TIFFs and no other format; where the size cannot tell, a mask would lie on the wrong pixels."""
    mask = save(tmp_path / "mask.png", LABELS)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8))
    for orientation in (2, 3, 4):
        photo.save(tmp_path / "photo.jpg", exif=b"Exif\0\0" + write.exif(orientation))
        with pytest.raises(ValueError, match=rf"photo\.jpg.*orientation {orientation}"):
            read_pair(tmp_path / "photo.jpg", mask)
    photo.save(tmp_path / "photo.jpg", exif=b"Exif\0\0" + write.exif(6))
    assert read_pair(tmp_path / "photo.jpg", mask)[0].shape == (3, 5, 3)  # turned, it would be 5 x 3
    photo.crop((0, 0, 3, 3)).save(tmp_path / "square.jpg", exif=b"Exif\0\0" + write.exif(6))
    with pytest.raises(ValueError, match=r"square\.jpg.*orientation 6"):
        read_pair(tmp_path / "square.jpg", save(tmp_path / "square.png", LABELS[:, :3]))
    (tmp_path / "photo.tif").write_bytes(write.tiff(LABELS, 8, tags={274: 6}))
    with pytest.raises(ValueError, match=r"image file .*photo\.tif.*orientation 6"):
        read_pair(tmp_path / "photo.tif", mask)
