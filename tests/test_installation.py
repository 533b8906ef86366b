"""Which copy of the package was imported, and why a part is missing in it: each cause has words of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import installs
import pytest
from source_builds import ROOT, copy_source

from semeda_fast import backend_info, installation
from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends import triton as triton_ops
from semeda_fast.backends.native import CudaInfo, native_info

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NOTHING = "where nothing is built. Build it in place: "
HIDES = "where it is not built, and not the copy in "
NO_COMPILER = "no working C++ compiler was found when this copy was installed"
PURE = "installed as pure Python, with SEMEDA_FAST_BUILD=none"


class Machine:
    """Copies of the package on a path of its own, and what pip noted of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.path: list[str] = []
        monkeypatch.setattr(sys, "path", self.path)
        noted = importlib.metadata.MetadataPathFinder.find_distributions
        context = importlib.metadata.DistributionFinder.Context
        monkeypatch.setattr(
            installation, "_distributions", lambda: list(noted(context(name="semeda-fast", path=self.path)))
        )

    def copy(self, name: str, *parts: str, source: bool = False, on_path: bool = True) -> Path:
        """The package in a folder, with these parts, which is a source folder or stands for site-packages."""
        root = self.folder / name
        package = root / "semeda_fast"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for part in parts:
            (package / f"{part}{SUFFIX}").touch()
        kernels = (root if source else package) / "kernels"
        kernels.mkdir()
        (kernels / "__init__.py").touch()
        if source:
            (root / "setup.py").touch()
            (root / "csrc").mkdir()
        if on_path:
            self.path.append(str(root))
        return package

    def note(self, site: str, *, made_from: Path | None = None, editable: bool = False, pure: bool = False) -> None:
        """The dist-info of an install into a folder, such as "site"."""
        facts = self.folder / site / "semeda_fast-0.1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: semeda-fast\nVersion: 0.1.0\n")
        (facts / "WHEEL").write_text(f"Root-Is-Purelib: {str(pure).lower()}\n")
        if made_from is not None:
            url = {"dir_info": {"editable": editable}, "url": made_from.as_uri()}
            (facts / "direct_url.json").write_text(json.dumps(url))
        if str(self.folder / site) not in self.path:
            self.path.append(str(self.folder / site))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path.resolve(), monkeypatch)


def reason(part: str, here: Path) -> str:
    found = installation.why_missing(part, here)
    assert found is not None
    assert found.startswith(f"semeda_fast.{part} is missing: ")
    return found


def test_a_source_folder_in_which_nothing_was_built(machine: Machine) -> None:
    here = machine.copy("source", source=True)
    found = reason("_C", here)
    assert f"imported the source folder {here}, {NOTHING}SEMEDA_FAST_BUILD=cpu python -m pip" in found
    assert f"pip install -e {here.parent}; it needs a C++17 compiler" in found
    assert installation.unbuilt_source(here)


def test_a_source_folder_that_hides_an_installed_copy(machine: Machine) -> None:
    here, there = machine.copy("a source", source=True), machine.copy("site", "_C")
    machine.note("site", made_from=here.parent)
    found = reason("_C", here)
    assert f"source folder {here}, {HIDES}{there}, which has it. Keep {here.parent} off sys.path" in found
    assert f'pip install -e "{here.parent}"' in found
    assert "compiler" not in found
    assert installation.unbuilt_source(here)
    assert "kernels" in reason("kernels", here)
    assert f"{HIDES}{there}" in reason("kernels", here)


def test_a_source_folder_that_hides_another_installed_in_place(machine: Machine) -> None:
    here, there = machine.copy("source", source=True), machine.copy("other", "_C", source=True, on_path=False)
    machine.note("site", made_from=there.parent, editable=True)
    assert f"{HIDES}{there}, which has it" in reason("_C", here)
    assert f"{HIDES}{there}, which has it" in reason("kernels", here)


@pytest.mark.parametrize("pure", [False, True])
def test_a_source_folder_installed_in_place_without_a_compiler(machine: Machine, pure: bool) -> None:
    here = machine.copy("source", source=True, on_path=False)
    machine.note("site", made_from=here.parent, editable=True, pure=pure)
    assert (PURE if pure else NO_COMPILER) in reason("_C", here)
    assert f"Build it in place: SEMEDA_FAST_BUILD=cpu python -m pip install -e {here.parent};" in reason("_C", here)
    assert not installation.unbuilt_source(here)


@pytest.mark.parametrize("pure", [False, True])
def test_an_installed_copy_without_a_compiler(machine: Machine, pure: bool) -> None:
    here = machine.copy("site")
    machine.note("site", made_from=machine.copy("source", source=True, on_path=False).parent, pure=pure)
    assert (PURE if pure else NO_COMPILER) in reason("_C", here)
    command = f"Install it with: SEMEDA_FAST_BUILD=cpu python -m pip install {machine.folder / 'source'}; it needs"
    assert command in reason("_C", here)
    assert not installation.unbuilt_source(here)


def test_an_installed_copy_of_which_nothing_is_known(machine: Machine) -> None:
    here = machine.copy("site")
    assert "pip install FOLDER, with the source folder in the place of FOLDER" in reason("_C", here)


def test_an_installed_copy_that_hides_another(machine: Machine) -> None:
    here, there = machine.copy("mine"), machine.copy("site", "_C")
    found = reason("_C", here)
    assert f"imported {here}, which lacks it, and not the copy in {there}" in found
    assert f"Uninstall the first, or keep {here.parent} off sys.path" in found


@pytest.mark.parametrize("source", [False, True])
def test_cuda_kernels_are_there_where_they_were_asked_for(machine: Machine, source: bool) -> None:
    here = machine.copy("here", "_C", source=source)
    found = reason("_C_cuda", here)
    assert "an install builds the CUDA kernels only where it is asked to" in found
    assert "SEMEDA_FAST_BUILD=cuda python -m pip install" in found
    assert "nvcc" in found
    assert "no working" not in found


def test_backend_info_names_the_build_where_there_is_a_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = CudaInfo(False, reason("_C_cuda", machine.copy("site", "_C")))
    monkeypatch.setattr(cuda_ops, "emulated", lambda: False)
    monkeypatch.setattr(cuda_ops, "cuda_info", lambda: missing)
    monkeypatch.setattr(cuda_ops, "_has_gpu", lambda: True)
    monkeypatch.setattr(cuda_ops.torch.version, "cuda", "13.0")
    assert "SEMEDA_FAST_BUILD=cuda python -m pip install" in str(backend_info())


def test_kernels_of_a_source_folder_that_only_setup_was_run_in(machine: Machine) -> None:
    here = machine.copy("source", "_C", source=True)
    assert "an install joins them. Build it in place: python -m pip install -e" in reason("kernels", here)


def test_a_note_that_is_no_json_is_passed_over(machine: Machine) -> None:
    here = machine.copy("site")
    machine.note("site")
    (machine.folder / "site" / "semeda_fast-0.1.0.dist-info" / "direct_url.json").write_text("{")
    assert NO_COMPILER in reason("_C", here)


@pytest.mark.skipif(installation.unbuilt_source(), reason="this is a source folder that nothing was installed in")
def test_nothing_is_missing_in_the_copy_at_hand() -> None:
    assert installation.why_missing("kernels") is None
    assert (installation.why_missing("_C") is None) == native_info().available


def test_a_bare_source_folder_says_why_it_has_no_triton_kernels(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    here = machine.copy("source", source=True)
    monkeypatch.setattr(triton_ops, "why_missing", lambda part: installation.why_missing(part, here))
    triton_ops._load.cache_clear()
    try:
        assert "nothing is built. Build it in place: python -m pip install -e" in triton_ops._load()[1]
    finally:
        triton_ops._load.cache_clear()


EDITABLE = any("__editable__" in getattr(finder, "__module__", "") for finder in sys.meta_path)


@pytest.mark.skipif(not EDITABLE, reason="this environment has no install in place")
def test_parts_of_two_copies_do_not_mix(tmp_path: Path) -> None:
    """An install in place of one folder offers its compiled modules and its kernels to the Python code of another."""
    other = copy_source(tmp_path / "other")
    code = (
        "import semeda_fast\nfrom semeda_fast.backends import native, triton\n"
        "print(semeda_fast.__file__, native.native_info().reason, triton._load()[1], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=other,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    home, native, kernels = done.stdout.split("\n")[:3]
    assert Path(home).samefile(other / "semeda_fast" / "__init__.py")
    assert "semeda_fast._C is missing: Python imported the source folder" in native
    if importlib.util.find_spec("triton") is not None:
        assert "semeda_fast.kernels is missing: Python imported the source folder" in kernels


@pytest.mark.skipif(os.name != "posix", reason="the environment is made of links")
@pytest.mark.parametrize("mode", ["", "none"])
def test_the_tests_of_a_bare_source_folder_end_at_once_with_the_remedy(tmp_path: Path, mode: str) -> None:
    """Unless pure Python is what is to be tested, and then they say what they leave out."""
    source = installs.checkout(tmp_path / "source")
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__", "build"))
    words = "['tests/test_schedule.py', '-p', 'no:cacheprovider', '-q']"
    script = f"import sys, pytest; sys.path.insert(0, ''); sys.exit(pytest.main({words}))"
    variables = {"SEMEDA_FAST_BUILD": mode, "SEMEDA_FAST_CUDA_EMULATION": ""}
    done = installs.run_script(script, source, tmp_path / "site", installs.others(tmp_path / "o"), **variables)
    text = done.stdout + done.stderr
    assert f"source folder {source / 'semeda_fast'}, where nothing is built" in text, text
    assert f"SEMEDA_FAST_BUILD=cpu python -m pip install -e {source}" in text
    assert done.returncode == (pytest.ExitCode.OK if mode else pytest.ExitCode.USAGE_ERROR), text
    assert ("Their tests were left out" in text) == bool(mode)
