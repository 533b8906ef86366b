"""What this build computes, in one word: compilers keep code on disk, and must not take that of another build.

torch.compile's cache on disk knows an operator by its name. `loss_terms` is composite, so what is kept there was made
of its Python, of this version or of another, with kernels or without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def digest(folder: Path) -> str:
    """A word that changes with the sources below a folder and with the compiled modules in it."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    for path in sorted(folder.glob("_C*")):
        facts = path.stat()
        total.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return total.hexdigest()[:16]


BUILD = digest(PACKAGE)
