"""Layer by layer on a GPU: our kernel, cuDNN's convolution, and cuDNN with a fused epilogue under torch.compile.

The table picks the winner of each layer. Ours come from a hook that the kernels' package provides:

    semeda_fast.kernels.bench.layer_cases(proxy, n, h, w, dtype) -> sequence of (name, run, bytes, flop)

    proxy   an EdgeProxy on the GPU; n, h, w in pixels; dtype of the features
    name    "forward l" for the prediction branch of layer l = 1..L, "dgrad l" for the gradient that leaves layer l
            towards its input (l = 1: the logits); any other name is a line without cuDNN beside it
    run     launches the kernel, all inputs allocated beforehand, on the current stream, waiting for nothing
    bytes   least traffic of one run, each operand once; flop: dense, a fused multiply-add is 2

Baselines get channels_last inputs in the same dtype, and so do what they can best. `forward` is bias, ReLU, difference,
distance and one byte of codes a feature; `dgrad` the mask, the seed, and, for layer 1, the softmax's backward.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.files import atomic_path

from .. import machine, timing
from ..suite.worker import first_line
from ..timing import Budget
from ..workloads import make_proxy, named

RESULTS = "layers.json"
SCHEMA = 1
CUT_SHORT = 4
HOOK = ("semeda_fast.kernels.bench", "layer_cases")
PROXIES = ("default", "wide")
SIZE = (16, 513, 513)  # N, H, W of VOC
OURS, CONVOLUTION, EPILOGUE = "semeda_fast", "cuDNN", "cuDNN + compiled epilogue"
LEAST = 10.0  # seconds a line may need, most of them compilation


@dataclass(frozen=True)
class LayerCase:
    """One thing to time; fields as in the module's text."""

    name: str
    contender: str
    run: Callable[[], object]
    bytes: int
    flop: int


def our_cases(proxy: EdgeProxy, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[LayerCase], str]:
    """What the hook gives, and a note where there is none; a hook that fails is a case that fails."""
    try:
        module = importlib.import_module(HOOK[0])
    except ModuleNotFoundError as error:
        return [], f"{'.'.join(HOOK)}: {first_line(error)}"
    try:
        found = getattr(module, HOOK[1])(proxy, *size, dtype)
        return [LayerCase(name, OURS, run, int(moved), int(flop)) for name, run, moved, flop in found], ""
    except Exception as error:  # the baselines are worth having all the same
        reason = RuntimeError(f"{'.'.join(HOOK)}: {first_line(error)}")
        return [LayerCase("kernels", OURS, functools.partial(_raise, reason), 0, 0)], ""


def _raise(error: Exception) -> None:
    raise error


def baseline_cases(
    proxy: EdgeProxy, size: tuple[int, int, int], dtype: torch.dtype, compiler: str = "inductor"
) -> list[LayerCase]:
    """cuDNN's forms of every layer in both directions, on the proxy's device."""
    cases = []
    for number in range(1, proxy.num_layers + 1):
        cases += _forward_cases(proxy, number, size, dtype, compiler)
    for number in range(proxy.num_layers, 0, -1):
        cases += _dgrad_cases(proxy, number, size, dtype, compiler)
    return cases


def _forward_cases(
    proxy: EdgeProxy, number: int, size: tuple[int, int, int], dtype: torch.dtype, compiler: str
) -> list[LayerCase]:
    weight, bias = (t[number - 1].to(dtype) for t in (proxy.weights, proxy.biases))
    weight = weight.contiguous(memory_format=torch.channels_last)
    out, before, side, _ = weight.shape
    x = _random(size, before, dtype, weight.device)
    target = _random(size, out, dtype, weight.device)

    def convolution() -> Tensor:
        return F.conv2d(x, weight, bias, padding=side // 2)

    def whole(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        d = t - target
        codes = (d > 0).to(torch.uint8) + 2 * (d < 0).to(torch.uint8) + 4 * (t > 0).to(torch.uint8)
        return torch.relu(t), d.abs().sum(dtype=torch.float32), codes

    fused = _compiled(whole, compiler)
    pixels, item = x.numel() // before, x.element_size()
    flop = 2 * side * side * before * out * pixels
    traffic = item * (weight.numel() + pixels * (before + out))
    more = traffic + pixels * out * (item + 1)  # the target's features, a byte of codes
    name = f"forward {number}"
    return [
        LayerCase(name, CONVOLUTION, convolution, traffic, flop),
        LayerCase(name, EPILOGUE, lambda: fused(x, weight, bias, target), more, flop),
    ]


def _dgrad_cases(
    proxy: EdgeProxy, number: int, size: tuple[int, int, int], dtype: torch.dtype, compiler: str
) -> list[LayerCase]:
    # The same convolution, turned by 180 degrees and its channels exchanged: (9) of kernels/README.md.
    turned = proxy.weights[number - 1].flip(2, 3).transpose(0, 1).to(dtype)
    weight = turned.contiguous(memory_format=torch.channels_last)
    before, out, side, _ = weight.shape
    d_t = _random(size, out, dtype, weight.device)
    other = _random(size, before, dtype, weight.device)
    if number == 1:
        other = other.float().softmax(1).to(dtype).contiguous(memory_format=torch.channels_last)
    codes = (7 * torch.rand(d_t.shape[0], before, *d_t.shape[2:], device=weight.device)).to(torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)

    def convolution() -> Tensor:
        return F.conv2d(d_t, weight, padding=side // 2)

    def hidden(d_t: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
        d_a = F.conv2d(d_t, weight, padding=weight.shape[-1] // 2)
        sign = (codes & 1).to(d_a.dtype) - ((codes >> 1) & 1).to(d_a.dtype)
        return d_a * ((codes >> 2) & 1).to(d_a.dtype) + 0.01 * sign

    def first(d_t: Tensor, weight: Tensor, p: Tensor) -> Tensor:
        d_p = F.conv2d(d_t, weight, padding=weight.shape[-1] // 2).float()
        return (p * (d_p - (p * d_p).sum(dim=1, keepdim=True))).to(p.dtype)

    extra = other if number == 1 else codes
    fused = _compiled(first if number == 1 else hidden, compiler)
    pixels, item = d_t.numel() // out, d_t.element_size()
    flop = 2 * side * side * before * out * pixels
    traffic = item * (weight.numel() + pixels * (before + out))
    name = f"dgrad {number}"
    return [
        LayerCase(name, CONVOLUTION, convolution, traffic, flop),
        LayerCase(
            name, EPILOGUE, lambda: fused(d_t, weight, extra), traffic + pixels * before * extra.element_size(), flop
        ),
    ]


def _random(size: tuple[int, int, int], channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    n, height, width = size
    values = torch.randn(n, channels, height, width, device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _compiled(function: Callable[..., Any], compiler: str) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)


@torch.no_grad()
def measure(
    name: str,
    proxy: EdgeProxy,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    deadline: float = float("inf"),
    budget: Budget | None = None,
    compiler: str = "inductor",
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time every layer of a proxy, all contenders of a line interleaved.

    Args:
        name: of the proxy in the results.
        deadline: time.monotonic() after which no line is begun.

    Returns:
        records, and notes: why ours are missing, and which lines were left out.
    """
    device = proxy.weights[0].device.type
    ours, note = our_cases(proxy, size, dtype)
    notes = [f"{name}: {note}"] if note else []
    cases = [*ours, *baseline_cases(proxy, size, dtype, compiler)]
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    records: list[dict[str, Any]] = []
    left_out = []
    for line in dict.fromkeys(case.name for case in sorted(cases, key=_order)):
        if deadline - time.monotonic() < LEAST:
            left_out.append(line)
            continue
        print(f"  {name}: {line}", file=sys.stderr, flush=True)
        found = [case for case in cases if case.name == line]
        facts = {"proxy": name, "size": list(size), "dtype": str(dtype).removeprefix("torch.")}
        records += [{**facts, **record} for record in _measure_line(found, device, budget or Budget(0.5, 7, 40))]
    if left_out:
        notes.append(f"{name}: left out, the time was up: {', '.join(left_out)}")
    return records, notes


def _order(case: LayerCase) -> tuple[int, str]:
    """Lines in the order in which a step runs them; those with another name last."""
    kind, _, number = case.name.partition(" ")
    if not number.isdigit() or kind not in ("forward", "dgrad"):
        return (2000, case.name)
    return (int(number) if kind == "forward" else 1000 - int(number), "")


def _measure_line(cases: Sequence[LayerCase], device: str, budget: Budget) -> list[dict[str, Any]]:
    records, steps = {}, {}
    for case in cases:
        record = {"name": case.name, "contender": case.contender, "bytes": case.bytes, "flop": case.flop}
        records[case.contender] = record
        try:
            case.run()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            record.update(status="failed", reason=first_line(error))
            continue
        steps[case.contender] = _quiet(case.run)
    for contender, samples in timing.interleaved(steps, budget, device=device, queued=True).items():
        records[contender].update(status="ok", seconds=samples.seconds)
    return list(records.values())


def _quiet(run: Callable[[], object]) -> timing.Step:
    def step() -> None:
        run()

    return step


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1: something failed; 4: the time was up before all was measured."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.layers", description="The layers of make gpu.")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"{RESULTS} in it is replaced")
    made.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    options = made.parse_args(arguments)
    deadline = time.monotonic() + options.limit
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for name in PROXIES:
        proxy = make_proxy(named("voc", proxy=name)).to(torch.device("cuda"))
        found, said = measure(name, proxy, SIZE, torch.bfloat16, deadline=deadline)
        records += found
        notes += said
        write(options.output, machine.describe("cuda"), records, notes)
        torch.compiler.reset()
    for note in notes:
        print(f"  note: {note}", file=sys.stderr)
    if any(record["status"] == "failed" for record in records):
        return 1
    return CUT_SHORT if any("the time was up" in note for note in notes) else 0


def write(folder: Path, facts: dict[str, Any], records: list[dict[str, Any]], notes: list[str]) -> Path:
    """Replace layers.json in one step."""
    path = folder / RESULTS
    data = {"schema": SCHEMA, "machine": facts, "records": records, "notes": notes}
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
