"""What ends the use of the device for a process, and what watches it from outside: asserts and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import criterion, each_backend, each_fused_backend, why_no_gpu
from helpers import NUM_CLASSES, make_inputs

SCRIPT = Path(__file__).with_name("one_step.py")
NO_END = -999
FOUND = 86  # compute-sanitizer's exit code for "something was found"


def run_script(arguments: list[str], *, tool: list[str] | None = None, timeout: float = 150.0) -> tuple[int, str]:
    """Exit code and all output of one_step.py, under a tool or not."""
    paths = [str(SCRIPT.parent.parent), *sys.path]  # where this process found torch, the package and the helpers
    child = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if tool:
        child["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation of its own, with bounds of its own
    command = [*(tool or []), sys.executable, str(SCRIPT), *arguments]
    try:
        result = subprocess.run(
            command, env=child, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        return NO_END, f"no end after {timeout:g} s: {error.stdout!r}"
    return result.returncode, result.stdout + result.stderr


@each_backend
def test_a_bad_label_is_an_asynchronous_assert(backend: str) -> None:
    code, text = run_script([backend, "--bad-label"])
    assert code != 0, text
    assert "one step done" not in text, text
    assert "device-side assert" in text, text
    assert "illegal memory access" not in text, text


@each_backend
def test_a_good_step_ends_well(backend: str) -> None:
    """The same script without the bad label: what the test above finds is the label."""
    code, text = run_script([backend])
    assert code == 0, text
    assert "one step done" in text


@each_backend
@pytest.mark.parametrize("wrong", [-1, NUM_CLASSES, 254, 2**40, -(2**40)])
def test_unchecked_bad_labels_make_nan_and_harm_nothing(backend: str, wrong: int) -> None:
    logits, target = make_inputs(h=65, w=67, void=0.0, device="cuda")
    loss = criterion(backend, validate="never")
    good = loss(logits, target)
    target[1, 30, 31] = wrong
    value = loss(logits, target)
    value.backward()
    assert value.isnan()
    assert logits.grad is not None
    assert logits.grad[1, :, 30, 31].isnan().any()
    torch.cuda.synchronize()
    target[1, 30, 31] = 0
    assert torch.isfinite(good)
    assert torch.isfinite(loss(logits, target))


def sanitizer() -> str | None:
    """compute-sanitizer in PATH, in CUDA's folder, or beside nvcc."""
    if found := shutil.which("compute-sanitizer"):
        return found
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parents[1]))
    for folder in filter(None, folders):
        for inside in ("bin", "compute-sanitizer"):
            if found := shutil.which("compute-sanitizer", path=str(Path(folder, inside))):
                return found
    return None


@each_fused_backend
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(backend: str, tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither in PATH nor in CUDA's folder")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch and Triton ask the driver for what may not be there
    code, text = run_script([backend, "--small", "--no-trial"], tool=command)
    for refusal in ("Device not supported", "not supported on this device", "Unable to find injection library"):
        if refusal in text:
            pytest.skip(f"compute-sanitizer does not work here: {refusal}")
    assert code == 0, f"{tool}: exit code {code}\n{text[-4000:]}"
    assert "one step done" in text, text[-4000:]
    assert "ERROR SUMMARY: 0 errors" in text or "0 hazards" in text, text[-2000:]


def test_without_a_gpu_the_reason_is_said() -> None:
    assert bool(why_no_gpu()) == (not torch.cuda.is_available())
    if why_no_gpu():
        assert "make gpu" in why_no_gpu()
