"""Every guarantee runs on every registered backend that can run here, on every device it has."""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from typing import Any, NamedTuple

import cuda_emulated
import pytest
import torch

# Before anything imports Triton or semeda_fast: without a GPU Triton's kernels run in the interpreter, CUDA's in an
# emulation.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    cuda_emulated.announce()
else:  # the reference is judged as fp32, which cuDNN's default would round to 10 bits
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False

# torch finds compiled graphs on the disk by the name of our operator, whatever its Python has become since: code of an
# earlier state would pass for this one's. The processes of one run share a folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="semeda_fast-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import interpreted

from semeda_fast import installation
from semeda_fast.backends import native
from semeda_fast.backends import registry as backends
from semeda_fast.backends import triton as triton_ops


def pytest_configure(config: pytest.Config) -> None:
    """End at once where the compiled module was forgotten: hundreds of tests would be left out, and the rest green."""
    if installation.unbuilt_source() and os.environ.get("SEMEDA_FAST_BUILD") != "none":
        reason = installation.why_missing("_C")
        raise pytest.UsageError(f"{reason}. `make test` builds it, too; to test pure Python set SEMEDA_FAST_BUILD=none")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What is left out where an install could not compile, at the end, where it is seen."""
    info = native.native_info()
    if not info.available:
        terminalreporter.section("without the CPU kernels")
        terminalreporter.write_line(f"Their tests were left out: {info.reason}")


class Case(NamedTuple):
    """One backend on one device."""

    backend: str
    device: str


def registered_cases() -> list[Case]:
    """All pairs of backend and device that this machine has; a new backend joins by registering its name."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [Case(name, device) for device in devices for name in backends.available_names(device)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = registered_cases()
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if triton_ops.interpreted() and "triton" in backends.available_names("cpu"):
        interpreted.make_quick()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the interpreter would take too long for; pytest reports the number."""
    left_out = [item for item in items if not _is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_length)


def _is_wanted(item: pytest.Item) -> bool:
    case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    return not isinstance(case, Case) or interpreted.wanted(item.name, case.backend, case.device)


# Backends that take part of the options alone; test_cuda_backend.py pins down which.
SELECTIVE = ("cuda",)

# Files that take longest, so that no process is left with one of them alone at the end; the others in any order.
LONGEST = (
    "test_compile_and_autograd",
    "test_cuda_faults",
    "test_cuda_kernels",
    "test_triton_aot",
    "test_bench_suite",
    "test_example_train",
    "test_packaging",
    "test_triton_kernels",
    "test_dtypes_and_layouts",
    "test_cli",
    "test_cpu_threads",
    "test_gpu_runner",
    "test_bench_steps",
    "test_cuda_resources",
    "test_upsample",
    "test_cuda_build",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file of tests to one process, which makes its module's fixtures once; None leaves another --dist alone."""
    if config.getoption("dist") != "load":
        return None
    config.option.loadscopereorder = False  # by the number of tests
    return importlib.import_module("xdist.scheduler").LoadFileScheduling(config, log)


def _length(item: pytest.Item) -> int:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A guarantee about what a selective backend refuses is skipped for it, with its own reason."""
    try:
        return (yield)
    except Exception as error:  # the refusal itself, or the compiler's error around it
        reason = _refusal(item, error)
        if reason:
            pytest.skip(reason)
        raise


def _refusal(item: pytest.Item, error: Exception) -> str:
    params = getattr(getattr(item, "callspec", None), "params", {})
    backend = params["case"].backend if "case" in params else params.get("backend")
    if backend not in SELECTIVE or isinstance(error, AssertionError):
        return ""
    found = re.search(rf"backend '{backend}' cannot do this: (.*?); use backend=", str(error))
    return found[1] if found else ""


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    """A test that draws without a seed would once in a while meet a sign that rounding decides."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Compiled code of one test must not serve, or exhaust the recompile limit of, the next."""
    torch.compiler.reset()
