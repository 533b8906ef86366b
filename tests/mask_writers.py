"""Image files written from their specifications, byte by byte: an oracle that shares no code with Pillow."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def packed_rows(samples: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Rows of unsigned samples [H,W] or [H,W,S], each padded to whole bytes; samples of 16 bits and more in `order`."""
    rows = []
    for row in samples.reshape(len(samples), -1):
        if bits >= 8 and bits % 8 == 0:
            rows.append(row.astype(f"{order}u{bits // 8}").tobytes())
            continue
        written = "".join(format(int(value), f"0{bits}b") for value in row)
        written += "0" * (-len(written) % 8)
        rows.append(bytes(int(written[i : i + 8], 2) for i in range(0, len(written), 8)))
    return rows


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    samples: np.ndarray,
    bits: int = 8,
    *,
    colour: int = 0,
    palette: np.ndarray | None = None,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG of samples [H,W] or [H,W,S].

    Args:
        colour: PNG's colour type: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGB + alpha.
        palette: [entries, 3].
        before, after: further chunks on either side of the pixels, (name, data).
    """
    height, width = samples.shape[:2]
    passes = [samples]
    if interlaced:
        passes = [samples[top::down, left::right] for top, left, down, right in ADAM7]
    data = b"".join(b"\0" + row for part in passes if part.size for row in packed_rows(part, bits))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))]
    if palette is not None:
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    chunks += [*before, (b"IDAT", zlib.compress(data)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def exif(orientation: int) -> bytes:
    """The EXIF block that says how an image is turned, as PNG's eXIf and JPEG's APP1 hold it."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def tiff(
    samples: np.ndarray,
    bits: int = 8,
    *,
    order: str = "<",
    tags: Mapping[int, Any] | None = None,
    without: Sequence[int] = (),
    planar: int = 1,
    rows_per_strip: int | None = None,
    encode: Any = None,
    pages: int = 1,
) -> bytes:
    """A TIFF of samples [H,W] or [H,W,S]; signed ones come as unsigned of the same bits.

    Args:
        tags: further tags, or other values for those that are written: 262 photometric, 259 compression, 274
            orientation, 277 samples, 338 extra samples, 339 sample format.
        without: tags that are left out.
        planar: 2 stores one band after the other.
        encode: bytes of a strip -> bytes as stored.
    """
    height, width = samples.shape[:2]
    bands = 1 if samples.ndim == 2 else samples.shape[2]
    step = rows_per_strip or height
    planes = [samples] if planar == 1 else [samples[..., band] for band in range(bands)]
    strips = [
        b"".join(packed_rows(plane[top : top + step], bits, order))
        for plane in planes
        for top in range(0, height, step)
    ]
    strips = [encode(strip) for strip in strips] if encode else strips
    entries: dict[int, Any] = {256: width, 257: height, 258: [bits] * bands, 259: 1, 262: 1, 277: bands, 278: step}
    entries |= {284: planar} | dict(tags or {})
    body = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0))

    def put(data: bytes) -> int:
        at = len(body)
        body.extend(data + b"\0" * (len(data) % 2))
        return at

    link = 4
    for _ in range(pages):
        written = {**entries, 273: [put(strip) for strip in strips], 279: [len(strip) for strip in strips]}
        directory = b""
        for tag in sorted(written.keys() - set(without)):
            values = written[tag] if isinstance(written[tag], list) else [written[tag]]
            kind, code = (4, "I") if tag in (273, 279) else (3, "H")
            data = struct.pack(f"{order}{len(values)}{code}", *values)
            field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", put(data))
            directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
        count = struct.pack(f"{order}H", len(directory) // 12)
        at = put(count + directory + b"\0\0\0\0")
        body[link : link + 4] = struct.pack(f"{order}I", at)
        link = at + 2 + len(directory)
    return bytes(body)


def bmp(samples: np.ndarray, bits: int, palette: np.ndarray, *, top_down: bool = False) -> bytes:
    """A BMP with a palette [entries, 3] of RGB, uncompressed."""
    height, width = samples.shape
    rows = [row + b"\0" * (-len(row) % 4) for row in packed_rows(samples, bits)]
    data = b"".join(rows if top_down else rows[::-1])
    colours = b"".join(bytes([b, g, r, 0]) for r, g, b in palette.astype(np.uint8).tolist())
    offset = 14 + 40 + len(colours)
    signed = -height if top_down else height
    head = struct.pack("<2sIHHI", b"BM", offset + len(data), 0, 0, offset)
    return (
        head
        + struct.pack("<IiiHHIIiiII", 40, width, signed, 1, bits, 0, len(data), 0, 0, len(palette), 0)
        + (colours + data)
    )


def gif(
    samples: np.ndarray,
    palette: np.ndarray,
    *,
    screen: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
    transparent: int | None = None,
) -> bytes:
    """A GIF of one frame with a global palette [2^n, 3]; its codes are cleared before the table would grow.

    Args:
        screen: (width, height) of the picture, of which the frame may cover a part that begins at `corner`.
    """
    height, width = samples.shape
    size = max(1, (len(palette) - 1).bit_length())
    smallest = max(2, size)
    clear, end = 1 << smallest, (1 << smallest) + 1
    codes = []
    for number, value in enumerate(samples.ravel().tolist()):
        if number % ((1 << smallest) - 2) == 0:
            codes.append(clear)
        codes.append(value)
    written, filled = 0, 0
    for code in [*codes, end]:
        written |= code << filled
        filled += smallest + 1
    data = written.to_bytes((filled + 7) // 8, "little")
    blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
    screen_width, screen_height = screen or (width, height)
    head = b"GIF89a" + struct.pack("<HHBBB", screen_width, screen_height, 0xF0 | (size - 1), 0, 0)
    control = b"" if transparent is None else b"!\xf9\x04" + struct.pack("<BHBB", 1, 0, transparent, 0)
    frame = b"," + struct.pack("<HHHHB", *corner, width, height, 0)
    return head + palette.astype(np.uint8).tobytes() + control + frame + bytes([smallest]) + blocks + b"\0;"
