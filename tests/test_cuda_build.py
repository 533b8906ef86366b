"""The build of semeda_fast._C_cuda: which nvcc and architectures, what a failure costs, what the module needs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_builds import (
    NO_COMPILER,
    ROOT,
    build,
    copy_source,
    fake_kernels,
    fake_nvcc,
    hide_nvcc,
    python,
    remove_kernels,
    run_in,
)

sys.path.insert(0, str(ROOT))

from benchmarks.gpu import session as gpu

SPEC = importlib.util.spec_from_file_location("semeda_fast_nvcc", ROOT / "csrc" / "cuda" / "nvcc.py")
assert SPEC is not None
assert SPEC.loader is not None
nvcc = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = nvcc  # dataclasses look their module up
SPEC.loader.exec_module(nvcc)

ONLY_CUDA = ["setup.py", "build_ext", "--inplace", "--only", "semeda_fast._C_cuda"]
posix_only = pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvcc")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree with small kernels, without anything built in it."""
    copy = copy_source(tmp_path / "source")
    fake_kernels(copy)
    return copy


def toolkit(*known: int, **facts: Any) -> Any:
    """What an nvcc that knows some architectures says of itself."""
    return nvcc.Toolkit(
        **{"nvcc": "/some/nvcc", "version": "12.3", "machine_code": frozenset(known), "ptx": frozenset(known)}
        | {"include_dirs": (), "library_dirs": ()}
        | facts
    )


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("", []),
        (" ; ", []),
        ("90", [90]),
        ("80,90", [80, 90]),
        ("80;86 90+PTX", [80, 86, 90, -90]),
        ("8.0, 12.0+ptx", [80, 120, -120]),
        ("90, 90+PTX, 90", [90, -90]),
    ],
)
def test_a_list_of_architectures(text: str, architectures: list[int]) -> None:
    assert nvcc.parse_architectures(text) == architectures


@pytest.mark.parametrize("word", ["all", "sm_90", "90a", "-90", "75", "9", "1200", "90+SASS", "9.0.0", "8 0"])
def test_a_bad_list_of_architectures_is_an_error(word: str) -> None:
    with pytest.raises(
        ValueError, match=r"SEMEDA_FAST_CUDA_ARCHS must list architectures of 80 or above, such as 80,90"
    ):
        nvcc.parse_architectures(f"80,{word}")


def test_the_default_is_what_nvcc_knows_and_ptx_of_the_newest() -> None:
    newest = toolkit(75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
    assert nvcc.choose_architectures([], newest) == [80, 86, 89, 90, 100, 120, -120]
    assert nvcc.choose_architectures([], toolkit(52, 75, 80, 86, 87, 89, 90)) == [80, 86, 89, 90, -90]
    # Machine code is made by way of PTX.
    assert nvcc.choose_architectures([], toolkit(80, 90, ptx=frozenset({80}))) == [80, -80]
    with pytest.raises(nvcc.CudaBuildError, match=r"nvcc 12\.3 .* knows none of .*80, 86.*install CUDA"):
        nvcc.choose_architectures([], toolkit(52, 75))


def test_what_is_asked_for_is_built_or_an_error() -> None:
    assert nvcc.choose_architectures([90, -90, 87], toolkit(80, 87, 90)) == [90, -90, 87]
    with pytest.raises(nvcc.CudaBuildError, match=r"asks for 100, 120, and nvcc 12\.3 \(/some/nvcc\) knows 80, 90; "):
        nvcc.choose_architectures([80, 100, -120], toolkit(80, 90))


def test_the_options_of_the_architectures() -> None:
    assert nvcc.gencode([80, 90, -90]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    options = nvcc.compile_options([80, 90, -90])
    assert r"-DSEMEDA_FAST_CUDA_ARCHITECTURES=80\,90\,-90" in options
    assert nvcc.initialiser([80, 90, -90]) == "80,90,-90"
    assert not any("fast" in option.replace("SEMEDA_FAST", "") for option in options)  # no --use_fast_math


@posix_only
def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, usual = (fake_nvcc(tmp_path / name, "") for name in ("home", "path", "usual"))
    monkeypatch.setattr(nvcc, "USUAL_HOMES", (str(usual),))
    variables = {"CUDA_HOME": str(home), "PATH": str(path / "bin")}
    assert nvcc.find_nvcc(variables) == str(home / "bin" / "nvcc")
    assert nvcc.find_nvcc({"CUDA_PATH": str(home), "PATH": str(path / "bin")}) == str(home / "bin" / "nvcc")
    assert nvcc.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": str(path / "bin")}) == str(path / "bin" / "nvcc")
    assert nvcc.find_nvcc({"PATH": str(tmp_path)}) == str(usual / "bin" / "nvcc")
    monkeypatch.setattr(nvcc, "USUAL_HOMES", ("/nonexistent/cuda",))
    message = r"CUDA_HOME \(/no\), CUDA_PATH \(not set\), PATH, /nonexistent/cuda\. Install .* or set CUDA_HOME"
    with pytest.raises(nvcc.CudaBuildError, match=message):
        nvcc.find_nvcc({"CUDA_HOME": "/no", "PATH": str(tmp_path)})


def test_the_host_compiler_is_the_one_that_cxx_names() -> None:
    assert nvcc.host_compiler({}) == []
    assert nvcc.host_compiler({"CXX": "g++-12 -pthread"}) == ["-ccbin", "g++-12"]
    assert nvcc.host_compiler({"CXX": "/usr/bin/ccache clang++"}) == ["-ccbin", "clang++"]
    assert nvcc.host_compiler({"CXX": "g++", "NVCC_CCBIN": "g++-12"}) == []  # nvcc reads it itself


# Copies its source, and notes its command.
COMPILES = """
echo "$@" >> "$(dirname "$0")/log"
for last; do :; done
case "$*" in *broken*) echo "x.cu(3): error: expected a ;" >&2; echo half > "$last"; exit 2;; esac
echo object > "$last"
"""


@posix_only
def test_objects_are_compiled_once_for_the_same_text_and_command(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path, COMPILES)
    log = home / "bin" / "log"
    kit = toolkit(90, nvcc=str(home / "bin" / "nvcc"))
    header, first, second = (tmp_path / name for name in ("a.h", "first.cu", "second.cu"))
    for path in (header, first, second):
        path.write_text("one")
    said: list[str] = []

    def compile_both(*options: str) -> tuple[list[str], int]:
        log.unlink(missing_ok=True)
        made = nvcc.Compilation(kit, options, (str(header),), str(tmp_path / "objects"))
        objects = made.compile_all([str(first), str(second)], said.append)
        return objects, len(log.read_text().splitlines()) if log.exists() else 0

    objects, compiled = compile_both("-O3")
    assert compiled == 2
    assert [Path(path).read_text() for path in objects] == ["object\n"] * 2
    assert [Path(path).name.partition("-")[0] for path in objects] == ["first", "second"]
    assert compile_both("-O3") == (objects, 0)
    assert f"{first}: unchanged, its object is used again" in said
    assert compile_both("-O2")[1] == 2
    first.write_text("two")
    assert compile_both("-O3")[1] == 1
    header.write_text("two")
    assert compile_both("-O3")[1] == 2
    # A failure says what failed, and leaves nothing that the next call would take for an object.
    for _ in range(2):
        with pytest.raises(nvcc.CudaBuildError, match=r"exit code 2 on .*: x\.cu\(3\): error: expected a ;"):
            compile_both("--broken")


def test_mode_cuda_without_nvcc_fails_at_once_and_says_what_to_do(source: Path) -> None:
    hide_nvcc(source)
    result = build(source, "wheel", SEMEDA_FAST_BUILD="cuda", CUDA_HOME="/some/cuda", **NO_COMPILER)
    assert result.returncode != 0
    assert "SEMEDA_FAST_BUILD=cuda: the native module semeda_fast._C_cuda did not build: nvcc was not" in result.stderr
    assert "CUDA_HOME (/some/cuda), CUDA_PATH (not set), PATH, /nonexistent/cuda" in result.stderr
    assert "set CUDA_HOME to the folder whose bin/ holds nvcc" in result.stderr
    assert "SEMEDA_FAST_BUILD=cpu installs without it" in result.stderr
    assert "building 'semeda_fast._C' extension" not in result.stdout + result.stderr
    assert list((source / "dist").iterdir()) == []


@posix_only
def test_mode_cuda_with_a_failing_nvcc_fails(source: Path, tmp_path: Path) -> None:
    script = 'case "$1" in --version) echo "release 11.0";; *) echo "nvcc fatal: unknown option" >&2; exit 1;; esac\n'
    home = fake_nvcc(tmp_path, script)
    result = run_in(source, ONLY_CUDA, SEMEDA_FAST_BUILD="cuda", CUDA_HOME=str(home))
    assert result.returncode != 0
    assert "--list-gpu-code` ended with exit code 1: nvcc fatal: unknown option" in result.stderr


@pytest.mark.parametrize(
    ("mode", "archs", "message"),
    [
        ("auto", "90", "SEMEDA_FAST_CUDA_ARCHS=90 is for CUDA kernels, which SEMEDA_FAST_BUILD=cuda builds; set that"),
        ("cuda", "80,banana", "SEMEDA_FAST_CUDA_ARCHS must list architectures of 80 or above"),
        ("cuda", "70", "got '70' in '70'"),
        ("cuda", "none", "SEMEDA_FAST_BUILD=cuda builds CUDA kernels, and SEMEDA_FAST_CUDA_ARCHS=none none"),
    ],
)
def test_a_bad_choice_of_architectures_ends_the_build(source: Path, mode: str, archs: str, message: str) -> None:
    result = run_in(source, ONLY_CUDA, SEMEDA_FAST_BUILD=mode, SEMEDA_FAST_CUDA_ARCHS=archs)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_mode_cuda_without_kernels_in_the_source_is_an_error(source: Path) -> None:
    remove_kernels(source)
    result = run_in(source, ONLY_CUDA, SEMEDA_FAST_BUILD="cuda")
    assert result.returncode != 0
    assert "SEMEDA_FAST_BUILD=cuda: this source has no CUDA kernels" in result.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SEMEDA_FAST_BUILD": "auto"},
        {"SEMEDA_FAST_BUILD": "auto", "SEMEDA_FAST_CUDA_ARCHS": "none"},
        {"SEMEDA_FAST_BUILD": "cpu", "SEMEDA_FAST_CUDA_ARCHS": "not read"},
    ],
)
def test_cuda_is_built_on_request_alone(source: Path, variables: dict[str, str]) -> None:
    result = run_in(source, ONLY_CUDA, **variables)
    assert result.returncode != 0
    assert "must name an extension of this build, ['semeda_fast._C']; got 'semeda_fast._C_cuda'" in result.stderr
    assert "SEMEDA_FAST_BUILD=cuda adds it" in result.stderr


GPU_AT_HAND = "#!/bin/sh\necho 9.0\n"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("gpu_there", "nvcc_there", "variables", "asked"),
    [
        (False, True, {}, ("auto", "none")),
        (True, True, {}, ("cuda", "90")),
        (True, False, {}, ("auto", "none")),
        (False, True, {"CUDA_ARCHS": "80"}, ("cuda", "80")),
        (True, True, {"CUDA_ARCHS": "none"}, ("auto", "none")),
        (False, True, {"SEMEDA_FAST_CUDA_ARCHS": "86"}, ("cuda", "86")),
        (False, True, {"SEMEDA_FAST_BUILD": "cuda"}, ("cuda", "")),
        (True, True, {"SEMEDA_FAST_BUILD": "cpu"}, ("cpu", "90")),
    ],
)
def test_make_builds_cuda_for_the_gpu_at_hand(
    source: Path, tmp_path: Path, gpu_there: bool, nvcc_there: bool, variables: dict[str, str], asked: tuple[str, str]
) -> None:
    hide_nvcc(source)
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    tools = fake_nvcc(tmp_path, "") / "bin" if nvcc_there else tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    smi = tools / "nvidia-smi"
    smi.write_text(GPU_AT_HAND if gpu_there else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    for name in ("make", "sh", "head", "tr"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        ["make", "-n", ".venv/.stamp-dev", f"PYTHON={sys.executable}"],
        cwd=source,
        env={"PATH": str(tools), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    [command] = [line for line in done.stdout.splitlines() if "pip install" in line]
    found = re.search(r'SEMEDA_FAST_BUILD="(.*?)" SEMEDA_FAST_CUDA_ARCHS="(.*?)"', command)
    assert found is not None
    assert found.groups() == asked


CHECK_MODULE = """
import json
from semeda_fast import _C_cuda as module
facts = {"file": module.__file__, "why": module.why_unavailable(), "architectures": module.architectures()}
print(json.dumps(facts | {"classes": module.MAX_CLASSES, "params": module.LossParams().n}))
"""


def test_nvcc_builds_a_module_that_imports_without_a_gpu(source: Path, tmp_path: Path) -> None:
    """The bindings as they are over small kernels: what is linked, what is exported, what is reported."""
    try:
        found = nvcc.inspect(nvcc.find_nvcc(), nvcc.host_compiler())
    except nvcc.CudaBuildError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    newest = max(set(nvcc.DEFAULT) & found.machine_code)
    setup = source / "setup.py"
    text = setup.read_text(encoding="utf-8")
    setup.write_text(text.replace('"-O3"', '"-O0"'), encoding="utf-8")
    variables = {"SEMEDA_FAST_BUILD": "cuda", "SEMEDA_FAST_CUDA_ARCHS": f"{newest}+PTX"}
    variables |= {name: os.environ[name] for name in nvcc.HOME_VARIABLES if name in os.environ}
    result = run_in(source, ONLY_CUDA, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"compiles for {newest},-{newest}" in result.stderr
    assert re.findall(r"^csrc/.*warning.*$", result.stdout + result.stderr, re.MULTILINE) == []
    [built] = (source / "semeda_fast").glob("_C*")
    assert built.name.startswith("_C_cuda.")

    # With no device to be seen, so that the same is asserted on a machine with a GPU.
    shutil.copytree(source / "kernels", source / "semeda_fast" / "kernels")
    facts = json.loads(python(CHECK_MODULE, tmp_path, source, CUDA_VISIBLE_DEVICES="-1"))
    assert Path(facts["file"]).resolve() == built.resolve()
    assert facts["architectures"] == [newest, -newest]
    assert re.search(r"driver|no CUDA-capable device", facts["why"])
    assert (facts["classes"], facts["params"]) == (256, 0)

    if sys.platform == "linux" and shutil.which("readelf"):
        dynamic, symbols = readelf("-d", built), readelf("--dyn-syms", built)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
        assert any(name.startswith("libstdc++") for name in needed)
        assert not any("cuda" in name for name in needed), needed
        assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
        # The static runtime's symbols are neither taken from another CUDA runtime in the process nor given to one.
        assert re.findall(r"\s((?:_*cuda|_ZNK?11semeda|PyInit)\w*)$", symbols, re.MULTILINE) == ["PyInit__C_cuda"]


def readelf(option: str, path: Path) -> str:
    """What binutils says of a library."""
    return subprocess.run(["readelf", "-W", option, str(path)], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a CUDA source, and an nvcc that can be found."""
    (tmp_path / "root" / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "root" / "csrc" / "cuda" / "some.cu").touch()
    (tmp_path / "tree" / "semeda_fast").mkdir(parents=True)
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/somewhere/{name}")
    monkeypatch.delenv("SEMEDA_FAST_CUDA_ARCHS", raising=False)
    return tmp_path / "root"


# setup.py of another checkout, which notes what it was asked for.
STAND_IN_SETUP = """
import os, pathlib, sys
words = dict(zip(sys.argv[1:], sys.argv[2:]))
assert words["--only"] == "semeda_fast._C_cuda"
folder = pathlib.Path(words["--build-lib"], "semeda_fast")
folder.mkdir(parents=True)
said = [os.environ.get(name) for name in ("SEMEDA_FAST_BUILD", "SEMEDA_FAST_CUDA_ARCHS")]
(folder / "_C_cuda.some-platform.so").write_text(str(said))
print("what the compiler says")
"""


def test_the_cuda_module_is_built_for_the_device_at_hand(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = checkout.parent / "tree"
    module = tree / "semeda_fast" / "_C_cuda.some-platform.so"
    (checkout / "setup.py").write_text(STAND_IN_SETUP)
    assert gpu.build(checkout, tree, "9.0", 30.0) == []
    assert module.read_text() == "['cuda', '9.0']"
    assert (checkout / gpu.WORK / gpu.BUILD_LOG).read_text() == "what the compiler says\n"
    assert "what the compiler says" not in "".join(capfd.readouterr())
    # Not known: the build's own default. Asked for by the user: that.
    assert gpu.build(checkout, tree, "", 30.0) == []
    assert module.read_text() == "['cuda', None]"
    monkeypatch.setenv("SEMEDA_FAST_CUDA_ARCHS", "80")
    assert gpu.build(checkout, tree, "9.0", 30.0) == []
    assert module.read_text() == "['cuda', '80']"


def test_a_build_that_fails_is_noted_and_leaves_no_earlier_module(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = checkout.parent / "tree"
    (checkout / "setup.py").write_text(STAND_IN_SETUP)
    assert gpu.build(checkout, tree, "9.0", 30.0) == []
    [module] = (tree / "semeda_fast").iterdir()
    module.unlink()  # as laying out the next call's tree does
    (checkout / "setup.py").write_text("import sys; sys.exit('nvcc says no in /a/folder')")
    [note] = gpu.build(checkout, tree, "9.0", 30.0)
    assert note == "the CUDA module did not build (exit code 1; build/gpu/build.log): no backend 'cuda'"
    assert "nvcc says no in /a/folder" in capfd.readouterr().err
    assert list((tree / "semeda_fast").iterdir()) == []
    (checkout / "setup.py").write_text("import time; time.sleep(60)")
    [note] = gpu.build(checkout, tree, "9.0", 1.0)
    assert "(stopped after 1 s: the time was up; build/gpu/build.log)" in note


def test_without_nvcc_or_cuda_sources_nothing_is_built(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "setup.py").write_text("raise SystemExit('must not be run')")
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.build(checkout, checkout, "9.0", 1.0) == []
    monkeypatch.undo()
    (checkout / "csrc" / "cuda" / "some.cu").unlink()
    assert gpu.build(checkout, checkout, "9.0", 1.0) == []
