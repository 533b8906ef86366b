#!/usr/bin/env bash
# Pillow 13.0.0: an uncompressed TIFF with orientation 6 (as cameras and scanners write it) has mixed-up pixels when it
# is opened by its path, and the right ones when the same file is opened as a file object. The file is Pillow's own.
# Prints versions and both readings. Exits with 0 while that is so, with 1 once the two agree.
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
stored = Image.new("L", (5, 3))
stored.putdata([0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24])
exif = Image.Exif()
exif[274] = 6  # viewers turn it by 90 degrees, clockwise
stored.save("turned.tif", exif=exif)


def rows(image):
    width, height = image.size
    return [[image.getpixel((x, y)) for x in range(width)] for y in range(height)]


expected = rows(stored.transpose(Image.Transpose.ROTATE_270))
with open("turned.tif", "rb") as file:
    by_object = rows(Image.open(file).copy())
by_path = rows(Image.open("turned.tif").copy())
print("stored, 5 x 3:              ", rows(stored))
print("turned, 3 x 5, expected:    ", expected)
print("Image.open(file object):    ", by_object)
print("Image.open(path):           ", by_path)
same = by_object == expected and by_path != expected
print("as described: by its path the file has other pixels" if same else "changed: not as described")
sys.exit(0 if same else 1)
EOF
