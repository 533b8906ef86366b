"""The adapters: importing the package imports no framework, and a missing one is said with the extra that brings it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {
    "transformers": "transformers",
    "lightning": "pytorch-lightning",
    "monai": "monai",
    "mmseg": "mmengine",
    "nnunet": "nnunetv2",
}
MODULES = ("transformers", "pytorch_lightning", "monai", "mmengine", "mmseg", "nnunetv2", "accelerate")
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_no_framework_is_imported_before_its_adapter() -> None:
    code = f"import sys, semeda_fast, semeda_fast.integrations\nprint([m for m in {MODULES!r} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("adapter", ["transformers", "mmseg", "nnunet"])
def test_a_missing_framework_is_said_with_its_extra(adapter: str) -> None:
    result = python(BLOCK.format(blocked=MODULES) + f"import semeda_fast.integrations.{adapter}")
    assert result.returncode == 1
    assert f"pip install 'semeda-fast[{adapter}]'" in result.stderr.splitlines()[-1]
    assert FRAMEWORKS[adapter] in result.stderr.splitlines()[-1]


def test_monais_adapter_needs_no_monai() -> None:
    """A MetaTensor is a tensor; the loss needs to know no more of it."""
    code = BLOCK.format(blocked=MODULES) + "from semeda_fast.integrations.monai import MonaiLoss"
    assert python(code).returncode == 0


@pytest.mark.parametrize("extra", FRAMEWORKS)
def test_each_has_an_extra(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra]
    assert FRAMEWORKS[extra] in [Requirement(line).name for line in lines]


def test_what_the_tests_install_is_pinned() -> None:
    names = re.findall(r"^[\w-]+$", (ROOT / "tests" / "integrations.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"^{re.escape(name)}==", pins, re.MULTILINE)] == []
