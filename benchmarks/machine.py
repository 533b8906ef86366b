"""What a result was measured on: processor, versions, threads, load; its FMA peak and copy bandwidth."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import semeda_fast
from semeda_fast.backends import native
from semeda_fast.backends import registry as backends

_ROOT = Path(__file__).resolve().parents[1]


def describe(device: str) -> dict[str, Any]:
    """Facts about machine and software as plain values; nothing that names a user or a path."""
    info = native.native_info()
    facts: dict[str, Any] = {
        "processor": processor_name(),
        "cores": available_cores(),
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "semeda_fast": semeda_fast.__version__,
        "commit": commit(),
        "native": {"available": info.available, **info.build} if info.available else {"available": False},
        "backends": list(backends.available_names(device)),
        "cpu_features": sorted(name for name, found in info.cpu.items() if found),
        "load_average": load_average(),
    }
    if device == "cuda":
        facts.update(_gpu_facts())
    return facts


def _gpu_facts() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> list[float] | None:
    """The system's load over 1, 5 and 15 minutes; None on Windows."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def total_memory() -> int | None:
    """Bytes of main memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def processor_name() -> str:
    """The processor's model, as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names: dict[str, str] = {}
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            names.setdefault(key.strip(), value.strip())
        if "model name" in names:
            family = f" (family {names.get('cpu family', '?')}, model {names.get('model', '?')})"
            return names["model name"] + family
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout, with "+" for changes to tracked files; "" outside a checkout."""
    head = _git("rev-parse", "--short", "HEAD")
    return head and head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a look must not write to the repository
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def measure_peaks(device: str, threads: int, *, quick: bool = False) -> dict[str, Any]:
    """FMA peak (FLOP/s, fp32) and copy bandwidth (bytes/s, read + write), and how each was measured.

    The native module's loops where it has them; otherwise the fastest of a matrix product and a convolution
    of torch, which may lie well below the peak, and a copy of torch. On CUDA also "half_flops", of a bf16 product.
    """
    if device == "cuda":
        return _cuda_peaks(threads, quick)
    module = native._load()[0] if device == "cpu" else None
    num_bytes = 2**24 if quick else 2**28
    if module is not None and hasattr(module, "fma_peak"):
        flops, how_flops = float(module.fma_peak(threads)), "FMA loop in registers (native module)"
    else:
        flops, how_flops = _torch_flops(device, quick), "fastest torch product or convolution (a lower bound)"
    if module is not None and hasattr(module, "copy_bandwidth"):
        copy, how_copy = float(module.copy_bandwidth(threads, num_bytes)), "copy loop (native module)"
    else:
        copy, how_copy = _torch_copy(device, num_bytes), "torch copy"
    return {"fma_flops": flops, "fma_how": how_flops, "copy_bytes": copy, "copy_how": how_copy, "threads": threads}


def _cuda_peaks(threads: int, quick: bool) -> dict[str, Any]:
    """Products large enough to fill any GPU; fp32 as IEEE fp32, which is torch's default for products."""
    n = 2048 if quick else 8192
    flops = {}
    for name, dtype in (("fma_flops", torch.float32), ("half_flops", torch.bfloat16)):
        a, b = torch.randn(n, n, device="cuda", dtype=dtype), torch.randn(n, n, device="cuda", dtype=dtype)
        flops[name] = 2 * n**3 / _best_seconds(functools.partial(torch.mm, a, b), "cuda")
    copy = _torch_copy("cuda", 2**26 if quick else 2**30)
    how = f"torch product of {n}x{n} matrices in fp32 (a lower bound)"
    return {**flops, "fma_how": how, "copy_bytes": copy, "copy_how": "torch copy", "threads": threads}


def _torch_flops(device: str, quick: bool) -> float:
    n = 256 if quick else 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    side = 64 if quick else 256
    image = torch.randn(1, 64, side, side, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device).to(memory_format=torch.channels_last)
    product = 2 * n**3 / _best_seconds(lambda: torch.mm(a, b), device)
    convolution = 2 * 9 * 64 * 64 * side**2 / _best_seconds(lambda: torch.conv2d(image, weight, padding=1), device)
    return max(product, convolution)


def _torch_copy(device: str, num_bytes: int) -> float:
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.ones_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(function: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """The shortest of some calls: a peak is what the machine can do undisturbed."""

    def timed() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    return min(timed() for _ in range(repeats))
