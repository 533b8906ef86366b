"""Which copy of this package Python imported, and why a part that an install adds is missing in it.

The parts are the compiled modules `_C` and `_C_cuda`, and `kernels`, which lies beside the package in a source folder.
Python looks first in the folder that it is started in, so a source folder hides an installed copy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = "semeda_fast"
HERE = Path(__file__).parent.absolute()
_DISTRIBUTION = "semeda-fast"
# What makes each part; the source folder comes last. In mode "cpu" a compiler that fails is an error.
_INSTALLS = {
    "_C": "SEMEDA_FAST_BUILD=cpu python -m pip install",
    "_C_cuda": "SEMEDA_FAST_BUILD=cuda python -m pip install",
    "kernels": "python -m pip install",
}
_NEEDS = {
    "_C": "; it needs a C++17 compiler, such as g++ or clang++",
    "_C_cuda": "; it needs nvcc, of NVIDIA's CUDA toolkit, and takes minutes",
    "kernels": "",
}


def why_missing(part: str, here: Path = HERE) -> str | None:
    """Why `semeda_fast.<part>` cannot be imported from this copy of the package, and what to do; None where it can.

    Args:
        part: "_C", "_C_cuda" or "kernels".
        here: the folder of the package that was imported.
    """
    spec = importlib.util.find_spec(f"{PACKAGE}.{part}")
    if spec is not None and _is_of(here, getattr(spec, "origin", None)):
        return None
    missing = f"{PACKAGE}.{part} is missing: "
    there = next((copy for copy in _other_copies(here) if _holds(copy, part)), None)
    if not is_source(here):
        if there is not None:
            return missing + (
                f"Python imported {here}, which lacks it, and not the copy in {there}, which has it. Uninstall the "
                f"first, or keep {here.parent} off sys.path"
            )
        source = _source_of(here)
        command = f"{_INSTALLS[part]} {_quoted(source or 'FOLDER')}"
        named = "" if source else ", with the source folder in the place of FOLDER"
        return missing + f"{_why_not_built(part, here)}. Install it with: {command}{named}{_NEEDS[part]}"
    command = f"{_INSTALLS[part]} -e {_quoted(here.parent)}"
    if there is not None:
        return missing + (
            f"Python imported the source folder {here}, where it is not built, and not the copy in {there}, which has "
            f"it. Keep {here.parent} off sys.path (Python puts the folder there that it is started in, pytest the one "
            f"that it tests), or build it in place: {command}"
        )
    cause = f"Python imported the source folder {here}, where nothing is built"
    if not unbuilt_source(here):
        cause = _why_not_built(part, here)
    return missing + f"{cause}. Build it in place: {command}{_NEEDS[part]}"


def is_source(here: Path = HERE) -> bool:
    """Whether this copy of the package lies in a source folder, where nothing is compiled but in place."""
    return (here.parent / "setup.py").is_file() and (here.parent / "csrc").is_dir()


def unbuilt_source(here: Path = HERE) -> bool:
    """Whether this copy is a source folder in which no install was made: it hides one, or there is none."""
    return is_source(here) and not _holds(here, "_C") and not _in_place(here.parent)


def _why_not_built(part: str, here: Path) -> str:
    """Why an install left a part out: CUDA kernels where nobody asked for them, others where it could not do it."""
    if part == "_C_cuda":
        return "an install builds the CUDA kernels only where it is asked to"
    if part == "kernels":
        return "a source folder has kernels/ beside the package, and an install joins them"
    for distribution in _distributions():
        folder, editable = _origin(distribution)
        home = folder / PACKAGE if editable and folder is not None else distribution.locate_file(PACKAGE)
        # setuptools calls a wheel pure where no extension was so much as tried.
        if _same(Path(str(home)), here) and "Root-Is-Purelib: true" in (distribution.read_text("WHEEL") or ""):
            return "this copy was installed as pure Python, with SEMEDA_FAST_BUILD=none (or without pybind11)"
    cause = "no working C++ compiler was found when this copy was installed"
    return f"{cause}, or the module was removed since, as `make clean` does" if is_source(here) else cause


def _distributions() -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions(name=_DISTRIBUTION))


def _origin(distribution: importlib.metadata.Distribution) -> tuple[Path | None, bool]:
    """The folder that it was installed from, and whether in place (direct_url.json, PEP 610)."""
    try:
        found = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None, False
    url = urlparse(found.get("url", ""))
    if url.scheme != "file":
        return None, False
    return Path(url2pathname(url.path)), bool(found.get("dir_info", {}).get("editable"))


def _source_of(here: Path) -> Path | None:
    """The source folder that an installed copy was made from, where it is still there."""
    for distribution in _distributions():
        folder, editable = _origin(distribution)
        mine = not editable and _same(Path(str(distribution.locate_file(PACKAGE))), here)
        if mine and folder is not None and (folder / "setup.py").is_file():
            return folder
    return None


def _in_place(root: Path) -> bool:
    """Whether `pip install -e` was run on this source folder in the environment at hand."""
    return any(
        editable and folder is not None and _same(folder, root) for folder, editable in map(_origin, _distributions())
    )


def _other_copies(here: Path) -> Iterator[Path]:
    """The folders of all other copies of the package that this Python knows of."""
    in_place = [folder for folder, editable in map(_origin, _distributions()) if editable and folder is not None]
    for root in [*(Path(entry or os.curdir) for entry in sys.path), *in_place]:
        if (root / PACKAGE / "__init__.py").is_file() and not _same(root / PACKAGE, here):
            yield (root / PACKAGE).absolute()


def _holds(package: Path, part: str) -> bool:
    if part == "kernels":
        joined = is_source(package) and _in_place(package.parent)
        return any((folder / part / "__init__.py").is_file() for folder in (package, *[package.parent] * joined))
    return any((package / f"{part}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def _is_of(here: Path, origin: str | None) -> bool:
    """Whether a part that Python found is this copy's: an install in place of another folder offers its own parts."""
    if origin is None:
        return True
    if Path(origin).name != "__init__.py":
        return _same(Path(origin).parent, here)
    home = Path(origin).parent.parent  # of kernels, which a source folder has beside the package
    return _same(home, here) or _same(home, here.parent)


def _same(folder: Path, other: Path) -> bool:
    """By name, too: a build tool may link each file from another place."""
    return folder.absolute() == other.absolute() or folder.resolve() == other.resolve()


def _quoted(path: Path | str) -> str:
    return f'"{path}"' if " " in str(path) else str(path)
