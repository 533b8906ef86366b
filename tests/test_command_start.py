"""How the command starts: help, version and completion without torch; the package itself with everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import semeda_fast

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "matplotlib", "accelerate", "PIL")
COMMAND = f"""
import json, sys
from semeda_fast_command import main
try:
    main()
finally:
    print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )


def printed_without_torch(*arguments: str, **environment: str) -> str:
    """What the command prints, once it is sure that nothing heavy was imported."""
    done = python(COMMAND, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == []
    return done.stdout


def test_the_installed_command_starts_outside_the_package() -> None:
    [script] = entry_points(group="console_scripts", name="semeda-fast")
    assert script.value == "semeda_fast_command:main"


@pytest.mark.parametrize("subcommand", [(), ("train-proxy",), ("info",), ("inspect",)], ids=" ".join)
def test_help_needs_no_torch(subcommand: tuple[str, ...]) -> None:
    text = printed_without_torch(*subcommand, "--help")
    assert text.startswith(f"Usage: {' '.join(('semeda-fast', *subcommand))} ")
    assert printed_without_torch(*subcommand, "-h") == text


def test_version_needs_no_torch() -> None:
    assert printed_without_torch("--version").strip() == semeda_fast.__version__


SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the tests' shell is any


def test_completion_is_printed_for_bash() -> None:
    script = printed_without_torch("--show-completion", "bash", **SHELL)
    assert "complete -o default -F" in script
    assert "_SEMEDA_FAST_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith("semeda-fast")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_completion_is_installed_where_bash_looks(tmp_path: Path) -> None:
    printed_without_torch("--install-completion", "bash", HOME=str(tmp_path), **SHELL)
    [script] = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".bashrc"]
    assert "_SEMEDA_FAST_COMPLETE=complete_bash" in script.read_text(encoding="utf-8")
    assert str(script) in (tmp_path / ".bashrc").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("semeda-fast in", {"info", "inspect"}), ("semeda-fast inspect --num", {"--num-classes"})],
)
def test_a_completion_needs_no_torch(line: str, expected: set[str]) -> None:
    words = len(line.split()) - 1
    text = printed_without_torch(_SEMEDA_FAST_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(words), **SHELL)
    assert set(text.split()) == expected


def test_a_subcommand_gets_what_it_needs() -> None:
    done = python(COMMAND, "info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["semeda_fast"] == semeda_fast.__version__
    assert "torch" in json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("before", ["", "import semeda_fast_command\n"], ids=["bare", "beside the entry"])
def test_a_bare_import_of_the_package_brings_names_and_operators(before: str) -> None:
    """A saved program names operators: they are there without a look at any attribute of the package."""
    code = "import semeda_fast\nimport torch\ntorch.ops.semeda_fast.loss_terms\nsemeda_fast.SemedaLoss(num_classes=3)"
    done = python(before + code)
    assert done.returncode == 0, done.stderr
