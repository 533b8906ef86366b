"""Right and wrong calls of EagerLoss of semeda_fast._C: its constructor and both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fuzz_cases import Call, Case, faulty, for_backward, unmade, without_memory
from fuzz_memory import F32, U8, Arena, Memory, Tensor
from fuzz_problems import Problem, problems
from hypothesis import strategies as st

DIRECTIONS = ("forward", "backward")
ONLY = {"loss_at": "forward", "d_loss_at": "backward", "d_logits": "backward"}  # of one direction


def eager_loss(module: Any, draw: st.DrawFn) -> Iterator[Case]:
    problem = for_backward(draw(problems()))
    none = Memory(0, optional=True, absent=True)  # maps are no part of it
    problem = replace(problem, buffers=problem.buffers | {"ce_map": none, "semeda_map": none})
    loss = Eager(module, problem, draw(st.booleans()))
    yield "", loss.both
    yield from faulty(loss.make_of, problem.number_faults(memory=False))
    proxy = loss.proxy()
    for i, memory in enumerate(proxy):
        for what, wrong in memory.faults():
            yield f"proxy: {what}", partial(loss.make, wrong={i: wrong})
    yield "a tensor of the proxy too few", partial(loss.make, number=len(proxy) - 1)
    yield "a tensor of the proxy too many", partial(loss.make, number=len(proxy) + 1)
    for direction in DIRECTIONS:
        for name, part in loss.parts().items():
            if ONLY.get(name, direction) == direction:
                faults: Any = part.faults(placed=True) if isinstance(part, Tensor) else part.faults()
                for what, wrong in faults:
                    yield f"{name}: {what}", loss.call(direction, {name: wrong})
        for threads in (0, -1):
            yield f"{threads} threads", loss.call(direction, {}, threads)
    for what, wrong in problem.tensors["d_logits"].faults():
        if wrong.stated_strides is not None:
            yield f"d_logits: {what}", loss.call("backward", {"d_logits": wrong})
    for direction in DIRECTIONS:
        yield "no constructor", loss.call(direction, {}, unmade=True)
    yield "", without_memory(getattr, unmade(module.EagerLoss), "kept_bytes")


@dataclass(frozen=True)
class Eager:
    """EagerLoss of one problem, and its two directions."""

    module: Any
    problem: Problem
    save: bool  # forward keeps what backward needs

    def proxy(self) -> list[Memory]:
        layers = self.problem.layers  # which may be wrong, and of no size
        counts = [*[out * before * size * size for out, before, size in layers], *[out for out, _, _ in layers]]
        return [Memory(4 * min(max(count, 0), 2**16)) for count in counts]

    def make(self, arena: Arena, wrong: dict[int, Memory] | None = None, number: int | None = None) -> Any:
        spans = [(wrong or {}).get(i, part).make(arena) for i, part in enumerate(self.proxy())]
        spans = (spans + spans)[: len(spans) if number is None else number]
        params = self.problem.params(self.module, arena)
        return self.module.EagerLoss(params, spans, mean=True, weighted=False, nan_if_empty=False)

    def make_of(self, problem: Problem, arena: Arena) -> Any:
        return replace(self, problem=problem).make(arena)

    def parts(self) -> dict[str, Tensor | Memory]:
        """Everything that the directions are handed."""
        given = {name: self.problem.tensors.get(name) for name in ("logits", "target", "valid", "d_logits")}
        parts: dict[str, Tensor | Memory] = {name: tensor for name, tensor in given.items() if tensor is not None}
        weight = self.problem.buffers["class_weight"]
        if not weight.absent:
            parts["class_weight"] = _row(weight.num_bytes // 4, F32)
        parts["kept"] = _row(self.kept_bytes(), U8)
        return parts | {"loss_at": Memory(4), "d_loss_at": Memory(4)}

    def kept_bytes(self) -> int:
        """Codes, saved differences and parameters, each on a line of 64 bytes."""
        end = 0
        for name in ("codes", "saved_d"):
            end = (end + self.problem.buffers[name].num_bytes + 63) // 64 * 64
        return end + sum(memory.num_bytes for memory in self.proxy())

    def both(self, arena: Arena) -> None:
        loss = self.make(arena)
        if loss.kept_bytes != self.kept_bytes():
            raise AssertionError(f"EagerLoss keeps {loss.kept_bytes} bytes, where {self.kept_bytes()} are right")
        record = self.run(arena, loss, "forward", {})
        self.run(arena, loss, "backward", {}, record=record)
        loss.seeds(record, 1.0)

    def call(self, direction: str, wrong: dict[str, Tensor | Memory], threads: int = 1, unmade: bool = False) -> Call:
        def run(arena: Arena) -> object:
            kind = self.module.EagerLoss
            loss = kind.__new__(kind) if unmade else self.make(arena)
            return self.run(arena, loss, direction, wrong, threads)

        return run

    def run(
        self,
        arena: Arena,
        loss: Any,
        direction: str,
        wrong: dict[str, Tensor | Memory],
        threads: int = 1,
        record: Any = None,
    ) -> Any:
        parts: dict[str, Any] = self.parts() | wrong
        names = "logits", "target", "valid", "class_weight", "kept"
        places = [parts[name].place(arena) if name in parts else None for name in names]
        if direction == "forward":
            if not self.save and "kept" not in wrong:
                places[-1] = None
            return loss.forward(tuple(places), 1.0, 0.5, parts["loss_at"].make(arena), threads)
        record = unmade(self.module.EagerResult) if record is None else record
        d_logits = parts["d_logits"]
        strides = tuple(d_logits.stated_strides or d_logits.strides)
        at = parts["d_loss_at"].make(arena)
        return loss.backward(tuple(places), record, at, d_logits.place(arena), strides, threads)


def _row(count: int, dtype: int) -> Tensor:
    return Tensor((1, 1, 1, count), (0, 0, 0, 1), dtype, (dtype,))
