"""What the fuzzers of both modules share. A case: what is wrong with a call, "" where nothing is, and the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fuzz_memory import ELEMENT, Arena
from fuzz_problems import FORWARD, READ, Problem
from hypothesis import strategies as st

Call = Callable[[Arena], object]
Case = tuple[str, Call]
Run = Callable[[Problem, Arena], object]
Entry = Callable[[Any, st.DrawFn], Iterator[Case]]  # of a module: right and wrong cases of one of its names


def without_memory(call: Callable[..., object], *arguments: object) -> Call:
    """A call that takes nothing of the arena."""

    def run(_: Arena) -> object:
        return call(*arguments)

    return run


def garbage(call: Callable[..., object], arguments: int) -> Iterator[Case]:
    """Arguments that no function takes."""
    for wrong in (None, "text", 2**64, object()):
        yield f"{wrong!r} as each argument", without_memory(call, *[wrong] * arguments)
    yield "no arguments", without_memory(call)


def faulty(run: Run, faults: Iterable[tuple[str, Problem]]) -> Iterator[Case]:
    """The same call of each wrong problem."""
    for what, wrong in faults:
        yield what, partial(run, wrong)


def for_backward(problem: Problem) -> Problem:
    """The same with codes, which backward needs."""
    buffers = {
        name: replace(memory, absent=False, optional=False) if name in ("codes", "saved_d") else memory
        for name, memory in problem.buffers.items()
    }
    return replace(problem, buffers=buffers)


def settings_of(kind: Any) -> Iterator[Case]:
    """Values that no attribute of LossParams takes."""

    def put(name: str, value: object) -> None:
        setattr(kind(), name, value)

    def put_proxy(value: object) -> None:
        kind().set_proxy(value)

    for name in (*sorted(FORWARD - READ), "class_weight", "logits", "n", "classes", "threads", "tap"):
        for wrong in ("text", object(), (1, 2, 3), (2**64, 4), (-1, 4), 2.5):
            yield f"{name} set to {wrong!r}", without_memory(put, name, wrong)
    for wrong in (None, 5, (1,), (-1, 4)):
        yield f"set_proxy({wrong!r})", without_memory(put_proxy, wrong)


def view(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    """Constructor of View."""
    right: list[Any] = [64, 0, [1, 2, 3, 4], 0, 16]
    yield "", without_memory(module.View, *right)
    yield "", without_memory(module.View, 0, len(ELEMENT) - 1, [0, 0, 0, 0], 0, 0)
    wrong: dict[int, tuple[Any, ...]] = {
        0: (-1, 2**64, None),
        1: (-1, len(ELEMENT), 2**31 - 1, 2**40),
        2: ([], [1, 2, 3], [1, 2, 3, 2**63], None),
        3: (-1, 2**60, 2**63),
        4: (2**63, None),
    }
    for i, values in wrong.items():
        for value in values:
            yield f"argument {i} is {value}", without_memory(module.View, *right[:i], value, *right[i + 1 :])


def unmade(kind: Any) -> Any:
    """An object that no constructor has seen."""
    return kind.__new__(kind)


def question(name: str) -> Entry:
    """A function that takes nothing."""

    def entry(module: Any, draw: st.DrawFn) -> Iterator[Case]:
        yield "", without_memory(getattr(module, name))

    return entry
