#!/usr/bin/env bash
# Pillow 13.0.0: a palette image whose two colours are black and white does not survive Pillow's own BMP. It is written
# with 8 bits a pixel, and read as if it had one; with any other two colours it comes back as it was.
# Prints versions and what comes back. Exits with 0 while that is so, with 1 once it comes back as it was.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check pillow==13.0.0
cd "$work"
venv/bin/python - <<'EOF'
import platform
import sys

import PIL
from PIL import Image

print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, {platform.system()} {platform.machine()}")
pixels = [[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]]


def back(palette):
    """What comes back of the pixels: the file's bits a pixel, the mode, and the rows, 255 as 1."""
    image = Image.new("P", (6, 3))
    image.putpalette(palette)
    image.putdata([value for row in pixels for value in row])
    image.save("mask.bmp")
    with open("mask.bmp", "rb") as file:
        bits = int.from_bytes(file.read()[28:30], "little")
    with Image.open("mask.bmp") as read:
        rows = [[min(1, read.getpixel((x, y))) for x in range(6)] for y in range(3)]
        return bits, read.mode, rows


others, black_and_white = back([0, 0, 0, 255, 0, 0]), back([0, 0, 0, 255, 255, 255])
print("written:                                        ", pixels)
print("black and red (bits in the file, mode, rows):   ", *others)
print("black and white (bits in the file, mode, rows): ", *black_and_white)
same = others == (8, "P", pixels) and black_and_white[:2] == (8, "1") and black_and_white[2] != pixels
print("as described: black and white alone come back as other pixels" if same else "changed: not as described")
sys.exit(0 if same else 1)
EOF
