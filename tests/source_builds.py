"""Builds of a copy of the source tree, as pip runs them, and Python with the result installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "semeda_fast", "semeda_fast_command.py")
SOURCE += ("kernels", "csrc")
# What may direct a build, or another package's import.
DROPPED = ("SEMEDA_FAST_BUILD", "SEMEDA_FAST_CUDA_ARCHS", "PYTHONPATH", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
DROPPED += ("PIP_NO_BUILD_ISOLATION", "CUDA_HOME", "CUDA_PATH", "SEMEDA_FAST_CUDA_EMULATION")

# Builds with no compiler that could be found: CC and CXX name nothing, and the PATH is empty.
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent"}

# The environment of the tests may hold an editable install of this very package.
OUT_OF_THE_WAY = """
import importlib.metadata, site, sys
noted = importlib.metadata.distributions
importlib.metadata.distributions = lambda **of: [
    d for d in noted(**of) if of.get("name") != "semeda-fast" or not str(d.locate_file("")).startswith(sys.prefix)
]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""

# csrc/cuda/api.h with one kernel, which compiles in seconds.
KERNELS = """
#include <cuda_runtime.h>

#include <stdexcept>

#include "api.h"

namespace semeda_fast::gpu {

__global__ void fill_kernel(float* out) { out[threadIdx.x] = 1; }

std::string why_unavailable() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
std::string why_unsupported(const LossParams&, int) { return "these are no kernels"; }
std::int64_t code_bytes(const LossParams&) { return 0; }
std::int64_t workspace_bytes(const LossParams&, int) { return 0; }
void forward(const LossParams&, const Buffer<char>& workspace, int, std::uintptr_t stream) {
    fill_kernel<<<1, 32, 0, reinterpret_cast<cudaStream_t>(stream)>>>(reinterpret_cast<float*>(workspace.data));
    if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("the launch failed");
}
void backward(const LossParams&, const Buffer<char>&, int, std::uintptr_t) {}
std::map<std::string, std::int64_t> plan(const LossParams&, int, bool) { return {}; }
void force_tile(int, int) {}

}  // namespace semeda_fast::gpu
"""
MORE_KERNELS = """
#include "api.h"

std::vector<int> semeda_fast::gpu::architectures() { return {SEMEDA_FAST_CUDA_ARCHITECTURES}; }
"""


def copy_source(copy: Path) -> Path:
    """A copy of the source tree without anything built in it."""
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("the metadata wants one\n")
    return copy


def remove_kernels(source: Path) -> None:
    """Leave the bindings as the only CUDA source."""
    for path in (source / "csrc" / "cuda").iterdir():
        if path.suffix == ".cu" or (path.suffix == ".cpp" and path.name != "bindings.cpp"):
            path.unlink()


def fake_kernels(source: Path) -> None:
    """Two small CUDA files in place of the kernels."""
    remove_kernels(source)
    (source / "csrc" / "cuda" / "fake.cu").write_text(KERNELS)
    (source / "csrc" / "cuda" / "more_fake.cu").write_text(MORE_KERNELS)


def hide_nvcc(source: Path) -> None:
    """Let the build look for nvcc in variables and PATH alone."""
    path = source / "csrc" / "cuda" / "nvcc.py"
    text = path.read_text(encoding="utf-8")
    hidden = text.replace('USUAL_HOMES = ("/usr/local/cuda", "/opt/cuda")', 'USUAL_HOMES = ("/nonexistent/cuda",)')
    assert hidden != text
    path.write_text(hidden, encoding="utf-8")


def fake_nvcc(folder: Path, script: str) -> Path:
    """A toolkit's folder whose nvcc is a shell script."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}")
    nvcc.chmod(0o755)
    return nvcc.parent.parent


def isolated_environment() -> dict[str, str]:
    """The environment without what may direct a build."""
    return {name: value for name, value in os.environ.items() if name not in DROPPED}


def build(source: Path, what: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one hook of the build backend in `source`, as pip does; the result lands in source/dist."""
    (source / "dist").mkdir(exist_ok=True)
    hook = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    return run_in(source, ["-c", hook], **variables)


def run_in(source: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `source`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env=isolated_environment() | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )


def unpack(source: Path) -> Path:
    """Unpack the one wheel in source/dist into a folder that stands for site-packages."""
    [wheel] = (source / "dist").glob("*.whl")
    site = source.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def python(code: str, folder: Path, site: Path, **variables: str) -> str:
    """Run `code` where `site` is on the path as site-packages would be; its output."""
    start = OUT_OF_THE_WAY + f"sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
    result = run_in(folder, ["-c", start + code], OMP_NUM_THREADS="1", **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout
