#!/usr/bin/env bash
# Pillow 13.0.0: a TIFF of signed integers that is big-endian and compressed is read with its bytes swapped (1 becomes
# 256), without a word. Uncompressed, little-endian or unsigned it is read rightly. tifffile 2026.3.3 writes the files.
# Prints versions and all readings. Exits with 0 while that is so, with 1 once they are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import platform
import sys

import numpy as np
import PIL
import tifffile
from PIL import Image

print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, tifffile {tifffile.__version__}, {sys.byteorder}-endian")
swapped = set()
for dtype in ("int16", "int32", "uint16"):
    numbers = np.array([[0, 1, 2, 300]], dtype)
    for order, name in (("<", "little-endian"), (">", "big-endian")):
        for compression in (None, "zlib"):
            tifffile.imwrite("numbers.tif", numbers, byteorder=order, compression=compression, photometric="minisblack")
            written = tifffile.imread("numbers.tif")
            with Image.open("numbers.tif") as image:
                read = np.asarray(image).astype(np.int64)
            print(f"{dtype:6} {name:13} {compression or 'uncompressed':12} tifffile {written.tolist()} Pillow {read.tolist()}")
            assert np.array_equal(written, numbers)
            if not np.array_equal(read, numbers):
                assert np.array_equal(read, numbers.byteswap().astype(np.int64))
                swapped.add((dtype, name, compression))
same = swapped == {("int16", "big-endian", "zlib"), ("int32", "big-endian", "zlib")}
print("as described: these are swapped:" if same else "changed: these are swapped:", sorted(swapped))
sys.exit(0 if same else 1)
EOF
