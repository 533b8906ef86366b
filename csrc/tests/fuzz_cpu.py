"""Right and wrong calls of semeda_fast._C, but for EagerLoss, which has a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import fuzz_eager
from fuzz_cases import (
    Case,
    Entry,
    Run,
    faulty,
    for_backward,
    garbage,
    question,
    settings_of,
    unmade,
    view,
    without_memory,
)
from fuzz_memory import Arena, Memory
from fuzz_problems import BACKWARD, FORWARD, Problem, problems
from hypothesis import strategies as st


def use_instruction_set(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    name = draw(st.one_of(st.text(), st.sampled_from(module.build_info()["instruction_sets"])))
    yield "", without_memory(module.use_instruction_set, name)
    for wrong in (None, 5, object(), ["avx2"]):
        yield f"a name that is {wrong!r}", without_memory(module.use_instruction_set, wrong)


def fma_peak(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    for threads in (0, -1, 10**6, 2**31 - 1, -(2**31)):
        yield f"{threads} threads", without_memory(module.fma_peak, threads)
    yield from garbage(module.fma_peak, 1)


def copy_bandwidth(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    threads, size = draw(st.integers(1, 3)), draw(st.integers(3, 5000))
    yield "", without_memory(module.copy_bandwidth, threads, size)
    for wrong in ((0, 100), (-1, 100), (10**6, 2**20), (1, 0), (3, 2), (1, -1), (1, 2**40), (1, 2**62)):
        yield f"{wrong}", without_memory(module.copy_bandwidth, *wrong)
    yield from garbage(module.copy_bandwidth, 2)


def has_bad_label(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem = draw(problems())

    def run(problem: Problem, arena: Arena) -> object:
        return module.has_bad_label(problem.params(module, arena))

    if problem.numbers.get("soft"):
        yield "a soft target", partial(run, problem)
        return
    yield "", partial(run, problem)
    yield from faulty(run, problem.image_faults(memory=True))
    yield from faulty(run, problem.memory_faults(frozenset({"target", "valid"})))
    yield "-1 classes", partial(run, replace(problem, classes=-1))
    yield from garbage(module.has_bad_label, 1)


def cpu_forward(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem = draw(problems())
    maps = not problem.buffers["ce_map"].absent
    to = {
        "ce": Memory(4, optional=True, absent=maps),
        "semeda": Memory(4, optional=True, absent=maps),
        "per_layer": Memory(4 * len(problem.layers)),
        "ce_weight": Memory(4),
        "valid_count": Memory(8, 8),
    }

    def run_to(to: dict[str, Memory], problem: Problem, arena: Arena) -> object:
        params = problem.params(module, arena, leave_out=frozenset({"terms", "counts"}))
        return module.cpu_forward(params, [memory.make(arena) for memory in to.values()])

    run = partial(run_to, to)
    yield "", partial(run, problem)
    yield from faulty(run, problem.number_faults())
    yield from faulty(run, problem.memory_faults(FORWARD - {"terms", "counts"}))
    yield from thread_faults(run, problem)
    for name, memory in to.items():
        for what, wrong in memory.faults():
            yield f"{name}: {what}", partial(run_to, to | {name: wrong}, problem)
    yield from garbage(module.cpu_forward, 2)


def cpu_backward(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem = for_backward(draw(problems()))

    def run(problem: Problem, arena: Arena) -> object:
        return module.cpu_backward(problem.params(module, arena))

    yield "", partial(run, problem)
    yield from faulty(run, problem.number_faults())
    yield from faulty(run, problem.memory_faults(BACKWARD if problem.pixels else BACKWARD - {"d_ce"}))
    yield from thread_faults(run, problem)
    yield from garbage(module.cpu_backward, 1)


def thread_faults(run: Run, problem: Problem) -> Iterator[Case]:
    for threads in (0, -1, -(2**31)):
        yield f"{threads} threads", partial(run, problem.having(threads=threads))


def loss_params(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    """Also what it says of codes; a copy; and one that no constructor has made."""
    problem, kind = draw(problems()), module.LossParams
    counts = "code_bytes_per_row", "saved_floats_per_row"
    count = draw(st.sampled_from(counts))

    def run(problem: Problem, arena: Arena) -> object:
        return getattr(problem.params(module, arena), count)()

    def copied(arena: Arena) -> object:
        return kind(problem.params(module, arena))

    yield "", partial(run, problem)
    yield "", copied
    yield from faulty(run, problem.number_faults(memory=False))
    for call in (*(getattr(kind, name) for name in counts), module.cpu_backward, module.has_bad_label):
        yield "no constructor", without_memory(call, unmade(kind))
    yield from settings_of(kind)


def eager_result(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    yield "no constructor", without_memory(module.EagerResult)
    yield "", without_memory(getattr, unmade(module.EagerResult), "bad_labels")


ENTRIES: dict[str, Entry] = {
    "EagerLoss": fuzz_eager.eager_loss,
    "EagerResult": eager_result,
    "LossParams": loss_params,
    "View": view,
    "build_info": question("build_info"),
    "copy_bandwidth": copy_bandwidth,
    "cpu_backward": cpu_backward,
    "cpu_features": question("cpu_features"),
    "cpu_forward": cpu_forward,
    "fma_peak": fma_peak,
    "has_bad_label": has_bad_label,
    "instruction_set": question("instruction_set"),
    "use_instruction_set": use_instruction_set,
}
WEIGHTS = {"cpu_forward": 7, "cpu_backward": 7, "EagerLoss": 10, "has_bad_label": 3, "LossParams": 2}
