"""The module that emulates a GPU is compiled once for a state of the sources, and its absence is no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulated
import pytest
import torch

from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends import registry as backends

pytest.importorskip("pybind11")
HERE = Path(__file__).resolve().parent
needs_compiler = pytest.mark.skipif(not cuda_emulated.find_compiler(), reason="there is no C++ compiler")
# Without pybind11's headers, which take seconds to compile.
BINDINGS = """
#include <Python.h>
#include "../number.h"
#define JOIN(a, b) a##b
#define NAMED(name) JOIN(PyInit_, name)
int number();
static PyObject* get(PyObject*, PyObject*) { return PyLong_FromLong(NUMBER + number()); }
static PyMethodDef methods[] = {{"number", get, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "numbers", "", -1, methods};
PyMODINIT_FUNC NAMED(SEMEDA_FAST_CUDA_MODULE)() { return PyModule_Create(&definition); }
"""


def test_it_is_built_where_it_can_be() -> None:
    """Else every guarantee would be left out unseen for the CUDA kernels."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, on which the kernels run")
    if not os.environ.get(cuda_emulated.VARIABLE):
        found = cuda_emulated.build()
        assert not found.broken, found.reason
        assert found.path is None, "it was switched off by an empty SEMEDA_FAST_CUDA_EMULATION"
        pytest.skip(found.reason)
    assert cuda_ops.why_unavailable() is None
    assert "cuda" in backends.available_names("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the smallest sources that could be compiled."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "tests").mkdir()
    (tmp_path / "csrc" / "number.h").write_text("#define NUMBER 40\n")
    (tmp_path / "csrc" / "cuda" / "bindings.cpp").write_text(BINDINGS)
    (tmp_path / "csrc" / "tests" / "cuda_emulation.cpp").write_text("int number() { return 2; }\n")
    (tmp_path / "tests").mkdir()
    shutil.copy2(HERE / "cuda_emulated.py", tmp_path / "tests")
    return tmp_path


def number_of(path: Path) -> int:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('{cuda_emulated.NAME}', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\nprint(module.number())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_compiler
def test_processes_that_start_together_compile_once(root: Path) -> None:
    command = [sys.executable, str(root / "tests" / "cuda_emulated.py")]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    ended = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ended
    paths = {out.strip() for out, _ in ended}
    assert len(paths) == 1
    assert "".join(err for _, err in ended).count("compiling the emulated CUDA kernels") == 1
    path = Path(paths.pop())
    assert path.is_relative_to(root / "build" / "cuda-emulation")
    assert number_of(path) == 42
    left = {entry.name for entry in path.parent.iterdir()}
    assert left <= {path.name, "lock", cuda_emulated.KEPT}  # no other objects left behind


@needs_compiler
def test_a_header_that_changes_is_another_state(root: Path) -> None:
    compiler = cuda_emulated.find_compiler()
    before = cuda_emulated.digest(root, compiler)
    assert cuda_emulated.digest(root, compiler) == before
    (root / "csrc" / "number.h").write_text("#define NUMBER 41\n")
    assert cuda_emulated.digest(root, compiler) != before


@needs_compiler
def test_sources_that_do_not_compile_say_so_and_leave_nothing(root: Path) -> None:
    (root / "csrc" / "tests" / "cuda_emulation.cpp").write_text("int number() { return two; }\n")
    found = cuda_emulated.build(root)
    assert found.path is None
    assert found.broken
    assert "two" in found.reason
    assert not list((root / "build").rglob(f"{cuda_emulated.NAME}*"))


@needs_compiler
def test_a_symbol_that_nobody_defines_is_found_at_once(root: Path) -> None:
    (root / "csrc" / "tests" / "cuda_emulation.cpp").write_text(
        "int elsewhere();\nint number() { return elsewhere(); }\n"
    )
    found = cuda_emulated.build(root)
    assert found.broken
    assert "elsewhere" in found.reason


def test_what_is_missing_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_emulated, "find_compiler", lambda: [])
    assert "no g++ or clang++" in cuda_emulated.build(root).reason
    (root / "csrc" / "tests" / "cuda_emulation.cpp").unlink()
    cuda_emulated.build.cache_clear()
    assert cuda_emulated.build(root) == (None, "there are no sources of the emulation here", False)


def test_it_is_announced_to_child_processes_even_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_emulated.VARIABLE, raising=False)
    monkeypatch.setattr(cuda_emulated, "build", lambda: cuda_emulated.Emulation(None, "none"))
    cuda_emulated.announce()
    assert os.environ.pop(cuda_emulated.VARIABLE) == ""
    monkeypatch.setenv(cuda_emulated.VARIABLE, "given")
    monkeypatch.setattr(cuda_emulated, "build", pytest.fail)
    cuda_emulated.announce()
    assert os.environ[cuda_emulated.VARIABLE] == "given"
