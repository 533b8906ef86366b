"""Right and wrong calls of semeda_fast._C_cuda, or of what emulates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fuzz_cases import Case, Entry, faulty, for_backward, garbage, question, settings_of, unmade, view, without_memory
from fuzz_memory import F32, Arena, Memory, Tensor
from fuzz_problems import BACKWARD, FORWARD, Problem, problems
from hypothesis import strategies as st

TILE = (2, 16)  # the smallest, which the emulation is quickest with


def force_tile(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem = draw(problems(cuda=True))
    tile = draw(st.sampled_from([(3, 16), (-1, -1), (2**31 - 1, 16), (2, 17)]))

    def run(arena: Arena) -> object:
        module.force_tile(*tile)
        try:
            return module.plan(problem.params(module, arena), 0, False)
        finally:
            module.force_tile(*TILE)

    yield f"no such tile {tile}", run
    yield from garbage(module.force_tile, 2)


def of_sizes(name: str, *more: object, refuses: bool = True) -> Entry:
    """A function that looks at sizes alone; some say why the kernels refuse a problem, others refuse it."""

    def entry(module: Any, draw: st.DrawFn) -> Iterator[Case]:
        problem, call = draw(problems(cuda=True)), getattr(module, name)

        def run(problem: Problem, arena: Arena) -> object:
            return call(problem.params(module, arena), *more)

        yield "", partial(run, problem)
        yield from faulty(run, problem.number_faults(memory=False))
        yield from faulty(run, unknown_to_kernels(problem) if refuses else ())
        yield from garbage(call, 1 + len(more))

    return entry


def unknown_to_kernels(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Problems that the CPU kernels would take."""
    for distance in (1, 2):
        yield f"distance {distance}", problem.having(distance=distance)
    yield "a soft target", problem.having(soft=True, soft_channels=problem.classes)
    yield "logits scaled up", problem.having(logits_h=1, logits_w=1)
    out, before, size = problem.layers[-1]
    yield "another proxy", replace(problem, layers=(*problem.layers[:-1], (out + 1, before, size)))
    first = (problem.layers[0][0], 257, 3)
    yield "too many classes", replace(problem, classes=257, layers=(first, *problem.layers[1:]))
    yield "too many rows", replace(problem, h=2**31, n=1, w=1)
    yield "too many tiles", replace(problem, h=2**23, w=2**23, n=1)
    maps = {"ce_map": Memory(4), "semeda_map": Memory(4)}
    yield "maps", replace(problem, buffers=problem.buffers | maps)


def direction(name: str) -> Entry:
    """cuda_forward or cuda_backward."""
    backward = name == "cuda_backward"

    def entry(module: Any, draw: st.DrawFn) -> Iterator[Case]:
        problem, call = draw(problems(cuda=True)), getattr(module, name)
        problem = for_backward(problem) if backward else problem
        with Arena(0) as arena:
            space = Memory(module.plan(problem.params(module, arena), 0, backward)["workspace"], 16)

        def run_in(space: Memory, problem: Problem, arena: Arena) -> object:
            return call(problem.params(module, arena), space.make(arena), 0, 0)

        run = partial(run_in, space)
        if draw(st.integers(0, 7)) == 0:  # in the emulation it takes as long as a hundred refusals
            yield "", partial(run, problem)
        yield from faulty(run, problem.number_faults())
        yield from faulty(run, problem.memory_faults(BACKWARD if backward else FORWARD))
        yield from faulty(run, unknown_to_kernels(problem))
        for what, wrong in space.faults():
            yield f"workspace: {what}", partial(run_in, wrong, problem)
        if backward and problem.pixels > 1:
            n, h, w = problem.n, problem.h, problem.w
            whole = Tensor((n, 1, h, w), (h * w, 0, w, 1), F32, (F32,))
            yield "a map as d_ce", partial(run, replace(problem, tensors=problem.tensors | {"d_ce": whole}))
        yield from garbage(call, 4)

    return entry


UNMADE: dict[str, tuple[object, ...]] = {  # what comes behind parameters that no constructor has seen
    "code_bytes": (),
    "why_unsupported": (0,),
    "workspace_bytes": (0,),
    "plan": (0, False),
    "cuda_forward": ((64, 2**40), 0, 0),
    "cuda_backward": ((64, 2**40), 0, 0),
}


def loss_params(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem, kind = draw(problems(cuda=True)), module.LossParams

    def copied(arena: Arena) -> object:
        return kind(problem.params(module, arena))

    yield "", copied
    for name, more in UNMADE.items():
        call: Callable[..., object] = getattr(module, name)
        yield "no constructor", without_memory(call, unmade(kind), *more)
    yield from settings_of(kind)


ENTRIES: dict[str, Entry] = {
    "LossParams": loss_params,
    "View": view,
    "architectures": question("architectures"),
    "code_bytes": of_sizes("code_bytes", refuses=False),
    "cuda_backward": direction("cuda_backward"),
    "cuda_forward": direction("cuda_forward"),
    "force_tile": force_tile,
    "plan": of_sizes("plan", 0, False),
    "why_unavailable": question("why_unavailable"),
    "why_unsupported": of_sizes("why_unsupported", 0, refuses=False),
    "workspace_bytes": of_sizes("workspace_bytes", 0),
}
WEIGHTS = {"cuda_forward": 7, "cuda_backward": 7}
