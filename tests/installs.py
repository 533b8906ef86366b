"""Source folders and installed copies of the package as users have them, and Python that sees no other copy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from source_builds import ROOT, copy_source, isolated_environment

START = """
import runpy, sys
sys.path += {paths!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def checkout(folder: Path) -> Path:
    """A source folder in which nothing is built."""
    return copy_source(folder)


def installed(site: Path, *, native: bool = True, pure: bool = False, made_from: Path | None = None) -> Path:
    """The package in a folder that stands for site-packages, as an install leaves it.

    Args:
        native: with the compiled module of the copy that runs the tests.
        pure: as SEMEDA_FAST_BUILD=none makes it.
        made_from: the source folder that pip noted.
    """
    package = site / "semeda_fast"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyd", *([] if native else ["*.so"]), "_C_cuda.*")
    shutil.copytree(ROOT / "semeda_fast", package, ignore=ignored)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignored)
    facts = site / "semeda_fast-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: semeda-fast\nVersion: 0.1.0\n")
    (facts / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(pure).lower()}\n")
    if made_from is not None:
        (facts / "direct_url.json").write_text(json.dumps({"dir_info": {}, "url": made_from.as_uri()}))
    return package


def others(folder: Path) -> Path:
    """Links to all that the environment of the tests has beside this package."""
    folder.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("semeda_fast", "__editable__")):
            (folder / path.name).symlink_to(path)
    return folder


def run_script(text: str, folder: Path, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script, script.py, with Python started in `folder` and the paths behind it on sys.path.

    Its warnings are shown on stderr as Python shows them.
    """
    script = paths[0].parent / "script.py"
    script.write_text(text)
    start = START.format(paths=list(map(str, paths)), script=str(script))
    return subprocess.run(
        [sys.executable, "-S", "-c", start],
        cwd=folder,
        env=isolated_environment() | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


links = os.name == "posix"
