"""Interleaved timing, and statistics of what it gives: medians, quartiles, ratios with intervals."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plain import LossFunction

MODES = ("nograd", "forward", "fwdbwd")
_SPIN_HZ = 2.0e9  # cycles a second of a waiting GPU, at most: waiting longer than asked for does no harm
Step = Callable[[], None]


@dataclass(frozen=True)
class Budget:
    """How long to measure: until `seconds` are over and `min_rounds` are done, at most `max_rounds`."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 200


@dataclass(frozen=True)
class Samples:
    """One measured value a round: seconds, and minor page faults (None where the system does not count them)."""

    seconds: list[float]
    faults: list[int] | None


def make_step(function: LossFunction, leaf: Tensor, target: Tensor, mode: str, grad_scale: float = 1.0) -> Step:
    """What is timed. fwdbwd releases the gradient inside, as a training step does: each allocation is paid for.

    Args:
        mode: "nograd" (forward under no_grad), "forward" (with the graph, which is dropped), "fwdbwd".

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    upstream = torch.tensor(grad_scale, device=leaf.device)

    def nograd() -> None:
        with torch.no_grad():
            function(leaf, target)

    def forward() -> None:
        function(leaf, target)

    def fwdbwd() -> None:
        function(leaf, target).backward(upstream)
        leaf.grad = None

    return {"nograd": nograd, "forward": forward, "fwdbwd": fwdbwd}[mode]


def interleaved(
    steps: Mapping[str, Step],
    budget: Budget,
    *,
    device: str = "cpu",
    warmup: int = 2,
    seed: int = 0,
    queued: bool = False,
    watch: Any = None,
) -> dict[str, Samples]:
    """Round-robin over all steps, in a fresh random order each round, after a warm-up of each.

    Sample i of all contenders belongs to round i, so drifts of the machine hit all of them alike.

    Args:
        queued: on CUDA, keep the device waiting until the host has queued the whole step, so that gaps in which the
            device waits for Python are not counted; False times an idle device, gaps included.
        watch: a `limits.Watch`, told of each call of the warm-up and of each round.
    """
    names = list(steps)
    for _ in range(warmup):  # in turns too: a heap that keeps its pages grows until it fits this order of requests
        for name in names:
            if watch is not None:
                watch.warming(name)
            start = time.perf_counter()
            steps[name]()
            if watch is not None:
                watch.warmed(name, time.perf_counter() - start)
    if not names:
        return {}
    order = random.Random(seed)
    timed: dict[str, Callable[[Step], float]] = dict.fromkeys(names, _cpu_time)
    if device == "cuda":
        timed = {name: _cuda_timer(_host_seconds(steps[name]) if queued else 0.0) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < budget.max_rounds:
            if rounds >= budget.min_rounds and time.perf_counter() - start >= budget.seconds:
                break
            if watch is not None:
                watch.round(rounds + 1)
            for name in order.sample(names, len(names)):
                before = minor_faults()
                seconds[name].append(timed[name](steps[name]))
                faults[name].append(minor_faults() - before)
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return {name: Samples(seconds[name], faults[name] if _counts_faults() else None) for name in names}


def _cpu_time(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_timer(ahead: float) -> Callable[[Step], float]:
    """Seconds between two events around a step; where `ahead` is not 0 the device first waits that many seconds."""

    def timed(step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(ahead * _SPIN_HZ))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return timed


def _host_seconds(step: Step) -> float:
    """How long the host takes to queue a step at most, with a margin; a step is not waited for."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        found.append(_cpu_time(step))
    torch.cuda.synchronize()
    return 1.5 * max(found) + 2e-4


def _counts_faults() -> bool:
    try:
        import resource  # noqa: F401
    except ImportError:  # Windows
        return False
    return True


def minor_faults() -> int:
    """Minor page faults of this process so far: pages that the kernel had to hand out (0 on Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    q1, median, q3 = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return float(q1), float(median), float(q3)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


def paired_ratio(
    slow: Sequence[float], fast: Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Ratio:
    """median(slow) / median(fast), rounds drawn with replacement, the same rounds for both.

    Efron, Tibshirani: An Introduction to the Bootstrap (1993), percentile intervals.

    Raises:
        ValueError: the two do not have the same number of rounds, or none.
    """
    a, b = np.asarray(slow, dtype=float), np.asarray(fast, dtype=float)
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired_ratio needs the same rounds of both, got {len(a)} and {len(b)}")
    drawn = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    return _interval(float(np.median(a) / np.median(b)), ratios, level)


def unpaired_ratio(
    new: Sequence[float], old: Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Ratio:
    """median(new) / median(old) of two separate runs, each drawn with replacement on its own.

    Raises:
        ValueError: one of the two is empty.
    """
    a, b = np.asarray(new, dtype=float), np.asarray(old, dtype=float)
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"unpaired_ratio needs samples of both runs, got {len(a)} and {len(b)}")
    rng = np.random.default_rng(seed)
    above = np.median(a[rng.integers(0, len(a), (resamples, len(a)))], axis=1)
    below = np.median(b[rng.integers(0, len(b), (resamples, len(b)))], axis=1)
    return _interval(float(np.median(a) / np.median(b)), above / below, level)


def _interval(value: float, ratios: np.ndarray, level: float) -> Ratio:
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(value, float(low), float(high))
