"""What is installed: the wheel's content, every build mode, and the imports that a plain install may do."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_builds import (
    NO_COMPILER,
    ROOT,
    build,
    copy_source,
    fake_nvcc,
    isolated_environment,
    python,
    unpack,
)

from semeda_fast.backends import native
from semeda_fast.backends.native import native_info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

MOST_CPU_SECONDS = 90  # of a plain install
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def source_version() -> str:
    """`__version__` as written in semeda_fast/__init__.py."""
    tree = ast.parse((ROOT / "semeda_fast" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise AssertionError("semeda_fast/__init__.py has no literal __version__")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree without anything built in it."""
    return copy_source(tmp_path / "source")


# One copy of the package, whose kernels are semeda_fast.kernels and nothing else.
CHECK_KERNELS = """
import importlib.util, pathlib, sys
import semeda_fast, semeda_fast.kernels
home = pathlib.Path({home!r}).resolve()
assert home in pathlib.Path(semeda_fast.__file__).resolve().parents, semeda_fast.__file__
assert home in pathlib.Path(semeda_fast.kernels.__file__).resolve().parents, semeda_fast.kernels.__file__
assert importlib.util.find_spec("kernels") is None, "kernels can be imported as a second module"
assert "triton" not in sys.modules
"""


# What an install has to do at least: a loss and a gradient that are the reference's.
CHECK_LOSS = """
import torch
from semeda_fast import EdgeProxy, SemedaLoss, backend_info
torch.manual_seed(0)
logits, target = torch.randn(2, 5, 33, 21), torch.randint(0, 5, (2, 33, 21))
def run(backend):
    leaf = logits.clone().requires_grad_()
    loss = SemedaLoss(EdgeProxy(5, distance="l2"), backend=backend, lambda_semeda=1.0)(leaf, target)
    loss.backward()
    return loss.detach(), leaf.grad
assert backend_info().auto["cpu"] == {backend!r}, backend_info()
for backend in ("auto", {backend!r}):
    for ours, theirs in zip(run(backend), run("reference"), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), backend
"""


def test_version_is_the_same_everywhere() -> None:
    version = source_version()
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)?", version)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    import semeda_fast

    assert semeda_fast.__version__ == version


def test_dependencies_are_three_and_the_build_needs_no_torch() -> None:
    assert PROJECT["dependencies"] == ["torch>=2.9", "numpy", "safetensors"]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {Requirement(line).name for line in requires} == {"setuptools", "pybind11"}


def test_every_dependency_is_pinned_for_ci() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    pinned = {canonicalize_name(pin.name) for pin in pins}
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(line) for group in (PROJECT["dependencies"], *extras.values()) for line in group]
    names = {canonicalize_name(wish.name) for wish in wanted} - {"semeda-fast"}
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"


def test_import_needs_torch_numpy_and_safetensors_only(tmp_path: Path) -> None:
    """Everything outside the three packages and what they require cannot be imported in the child."""
    allowed: set[str] = set()
    waiting = ["torch", "numpy", "safetensors"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in allowed:
            continue
        allowed.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    blocked = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & (allowed | {"semeda-fast"})
    }
    assert {"PIL", "tqdm", "accelerate", "torchmetrics", "matplotlib", "typer", "scipy"} <= blocked
    code = f"""
import json, sys
blocked = set(json.loads({json.dumps(sorted(blocked))!r}))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(ROOT)!r})
import semeda_fast
from semeda_fast import SemedaLoss, semeda_loss, EdgeProxy, train_proxy, backend_info
import semeda_fast.backends.native
semeda_fast.backends.native.native_info()
print(json.dumps(sorted(blocked & {{name.partition(".")[0] for name in sys.modules}})))
"""
    assert json.loads(python(code, tmp_path, tmp_path)) == []


def test_mode_none_builds_a_pure_wheel_with_everything_in_it(source: Path, tmp_path: Path) -> None:
    result = build(source, "wheel", SEMEDA_FAST_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "SEMEDA_FAST_BUILD=none" in result.stderr
    [wheel] = (source / "dist").iterdir()
    assert wheel.name == f"semeda_fast-{source_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        content = set(archive.namelist())
        info = f"semeda_fast-{source_version()}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "*/*.py", "proxy/weights/*.safetensors")
        for path in (ROOT / "semeda_fast").glob(pattern)
    }
    expected |= {f"semeda_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    expected.add("semeda_fast_command.py")
    assert "semeda_fast/py.typed" in expected
    assert any(name.endswith(".safetensors") for name in expected)
    assert {name for name in content if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in content
    assert "semeda-fast = semeda_fast_command:main" in scripts
    assert f"Version: {source_version()}" in metadata

    site = unpack(source)
    code = CHECK_KERNELS.format(home=str(site)) + (
        "from semeda_fast.backends.native import native_info\n"
        "info = native_info()\n"
        "assert not info.available and info.build == {} and info.cpu == {}, info\n"
        "assert 'SEMEDA_FAST_BUILD=cpu' in info.reason, info.reason\n"
    )
    python(code, tmp_path, site)


def test_mode_auto_without_a_compiler_builds_and_says_so(source: Path, tmp_path: Path) -> None:
    result = build(source, "wheel", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert "installing without the native module semeda_fast._C (" in result.stderr
    assert "CUDA" not in result.stderr
    site = unpack(source)
    assert (site / "semeda_fast" / "kernels" / "__init__.py").is_file()
    assert list(site.rglob("_C*")) == []
    code = CHECK_KERNELS.format(home=str(site)) + CHECK_LOSS.format(backend="reference")
    code += (
        "from semeda_fast.errors import BackendUnavailableError\n"
        "[cpu] = [status for status in backend_info().backends if status.name == 'cpu']\n"
        "assert not cpu.available and 'no working C++ compiler was found' in cpu.reason, cpu\n"
        "try:\n    SemedaLoss(EdgeProxy(5), backend='cpu')\n"
        "except BackendUnavailableError as error:\n    print('refused:', error)\n"
    )
    refusal = python(code, tmp_path, site)
    assert "refused: backend 'cpu' is not available" in refusal
    assert "SEMEDA_FAST_BUILD=cpu" in refusal


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="there is no C++ compiler")
def test_an_isolated_build_without_torch_gives_working_kernels(source: Path, tmp_path: Path) -> None:
    """`pip wheel .` as a user runs it: pip makes the build environment from pyproject.toml's list alone.

    An nvcc that is there is not so much as asked for its version, and the whole takes little of the processor.
    """
    called = tmp_path / "nvcc was called"
    home = fake_nvcc(tmp_path, f"echo called > '{called}'\nexit 3\n")
    setup = source / "setup.py"
    probe = "import importlib.util\nassert importlib.util.find_spec('torch') is None, 'torch is there at build time'\n"
    text = setup.read_text(encoding="utf-8")
    quick = text.replace('"-O3"', '"-O0"')  # what is under test does not depend on it, and it takes most of the time
    assert quick != text
    setup.write_text(quick.replace("import os\n", probe + "import os\n", 1), encoding="utf-8")
    assert probe in setup.read_text(encoding="utf-8")
    path = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    before = sum(os.times()[2:4])
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--wheel-dir", "dist", "."],
        cwd=source,
        env=isolated_environment() | {"CUDA_HOME": str(home), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    output = done.stdout + done.stderr
    if done.returncode and re.search(r"No matching distribution found for (setuptools|pybind11)", output):
        pytest.skip("pip reaches no index to fill an isolated build environment from")
    assert done.returncode == 0, output
    assert not called.exists()
    assert "CUDA" not in output
    assert sum(os.times()[2:4]) - before < MOST_CPU_SECONDS
    site = unpack(source)
    assert list(site.rglob("_C_cuda*")) == []
    python(CHECK_KERNELS.format(home=str(site)) + CHECK_LOSS.format(backend="cpu"), tmp_path, site)


def test_mode_cpu_without_a_compiler_fails_and_says_what_to_do(source: Path) -> None:
    result = build(source, "wheel", SEMEDA_FAST_BUILD="cpu", **NO_COMPILER)
    assert result.returncode != 0
    assert "SEMEDA_FAST_BUILD=cpu: the native module semeda_fast._C did not build" in result.stderr
    assert "C++17 compiler" in result.stderr
    assert list((source / "dist").iterdir()) == []


def test_an_unknown_mode_is_an_error(source: Path) -> None:
    result = build(source, "wheel", SEMEDA_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert "SEMEDA_FAST_BUILD must be one of auto, cpu, cuda, none; got 'gpu'" in result.stderr


def test_sdist_holds_what_a_build_needs(source: Path) -> None:
    result = build(source, "sdist", SEMEDA_FAST_BUILD="none")
    assert result.returncode == 0, result.stderr
    [archive] = (source / "dist").iterdir()
    with tarfile.open(archive) as tar:
        content = {name.partition("/")[2] for name in tar.getnames()}
    files = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    assert {"csrc/cuda/nvcc.py", "csrc/cuda/bindings.cpp"} <= files
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "semeda_fast").rglob("*.safetensors")}
    assert files | {"pyproject.toml", "setup.py", "LICENSE", "kernels/__init__.py"} <= content


@pytest.mark.skipif(
    os.environ.get("SEMEDA_FAST_PACKAGING") != "full",
    reason="`make test` itself runs on an editable install; SEMEDA_FAST_PACKAGING=full makes another one",
)
def test_editable_install_maps_the_kernels_folder_and_builds_in_place(source: Path, tmp_path: Path) -> None:
    """The form of `pip install -e .`: the source folder is imported, semeda_fast.kernels from kernels/."""
    compiler = shutil.which("g++") or shutil.which("c++")
    mode = "cpu" if compiler else "none"
    quick = tmp_path / "quick-c++"  # what is under test does not depend on optimisation, which takes most of the time
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O1\n')
    quick.chmod(0o755)
    named = {"CC": str(quick), "CXX": str(quick)} if compiler and os.name == "posix" else {}
    result = build(source, "editable", SEMEDA_FAST_BUILD=mode, **named)
    assert result.returncode == 0, result.stderr
    warnings = re.findall(r"^csrc/.*warning:.*$", result.stdout + result.stderr, re.MULTILINE)
    assert warnings == []
    site = unpack(source)
    code = CHECK_KERNELS.format(home=str(source)) + (
        "from semeda_fast.backends.native import native_info\n"
        "import dataclasses, json, torch\n"
        "torch.set_num_threads(3)\n"
        "print(json.dumps(dataclasses.asdict(native_info())))\n"
    )
    info = json.loads(python(code, tmp_path, site))
    assert info["available"] == (mode == "cpu")
    if mode == "cpu":
        assert info["build"]["cxx_standard"] >= 201703
        assert re.match(r"(gcc|clang) \d+\.\d+", info["build"]["compiler"])
        if info["build"]["compiler"].startswith("gcc"):
            assert info["build"]["openmp"]
        # One OpenMP runtime in the process: the one that torch.set_num_threads controls.
        assert info["build"]["openmp_threads"] == (3 if info["build"]["openmp"] else 1)
        built = info["build"]["instruction_sets"]
        assert built[-1] == "portable"
        if platform.machine() in ("x86_64", "AMD64"):
            assert built == ["avx512", "avx2", "portable"]
        elif platform.machine() == "aarch64":
            assert built == ["neon", "portable"]
        check_cpu_flags(info["cpu"])


def check_cpu_flags(found: dict[str, bool]) -> None:
    """Compare with what the system says of its processor, where it says it in a file."""
    x86 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"}
    arm = {"neon": "asimd", "neon_bf16": "bf16", "sve": "sve"}
    assert set(found) == x86 | set(arm)
    if not Path("/proc/cpuinfo").exists():
        return
    text = Path("/proc/cpuinfo").read_text()
    listed = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)).split())
    if platform.machine() in ("x86_64", "AMD64"):
        assert {name for name in found if found[name]} == x86 & listed
    elif platform.machine() == "aarch64":
        assert {name for name in found if found[name]} == {name for name in arm if arm[name] in listed}


def test_native_info_explains_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never an exception: a broken binary becomes a reason."""
    real = native.importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "semeda_fast._C":
            raise ImportError("undefined symbol: omp_get_max_threads")
        return real(name, package)

    monkeypatch.setattr(native.importlib, "import_module", broken)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    native._load.cache_clear()
    native.native_info.cache_clear()
    try:
        info = native_info()
    finally:
        native._load.cache_clear()
        native.native_info.cache_clear()
    assert not info.available
    assert "undefined symbol" in info.reason
    assert "again" in info.reason


def test_nothing_in_kernels_can_be_imported_under_a_second_name(tmp_path: Path) -> None:
    """A probe for a package called `kernels` (transformers makes one) finds an empty one."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "some_kernel.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kernels\n"
        "try:\n    import kernels.some_kernel\nexcept ImportError as error:\n    print('refused:', error)\n"
    )
    assert "refused: No module named 'kernels.some_kernel'" in python(code, tmp_path, tmp_path)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_what_make_cleans_away_it_builds_again(tmp_path: Path) -> None:
    """Else the tests would run without the kernels, since the environment counts as complete."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stamps = [tmp_path / "venv" / name for name in (".stamp-python", ".stamp-dev", ".stamp-demo")]
    folders = [
        tmp_path / name for name in ("venv", "semeda_fast", "kernels", "csrc", "tests", "examples", "benchmarks")
    ]
    for folder in folders:
        folder.mkdir()
    for stamp in stamps:
        stamp.touch()
    subprocess.run(["make", "clean", "VENV=venv"], cwd=tmp_path, check=True, capture_output=True)
    assert [stamp.exists() for stamp in stamps] == [True, False, False]


def test_torch_is_one_that_the_package_accepts() -> None:
    """The environment of the tests obeys the package's own range."""
    [torch_range] = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert torch_range.specifier.contains(torch.__version__, prereleases=True)
