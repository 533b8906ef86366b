"""Runs the CUDA kernels' bodies in the emulation: numbers of the emulated machine, and memory between guard zones.

`run` calls the module directly, with everything poisoned that it may write. Needs SEMEDA_FAST_CUDA_EMULATION.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from semeda_fast.backends.native import cuda_module, span
from semeda_fast.backends.params import add_gradients, fill
from semeda_fast.backends.problem import Problem

VARIABLE = "SEMEDA_FAST_CUDA_EMULATION"
D_CE, D_SEMEDA = 0.75, 1.5  # gradients of the two terms, where a test does not say otherwise

# What the largest opt-in of a block is, and what a multiprocessor has (CUDA Programming Guide, compute capabilities).
DEVICES = {
    "sm_80": {"shared_per_block": 163 << 10, "shared_per_multiprocessor": 164 << 10},
    "sm_86": {"shared_per_block": 99 << 10, "shared_per_multiprocessor": 100 << 10},
    "sm_90": {"shared_per_block": 227 << 10, "shared_per_multiprocessor": 228 << 10},
}


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated module once more, for csrc/tests/cuda_emulation_options.cpp."""
    found = ctypes.CDLL(os.environ[VARIABLE])
    found.semeda_fast_emulated_accesses.restype = ctypes.c_char_p
    found.semeda_fast_emulated_poison.restype = ctypes.c_uint32
    return found


def set_number(name: str, value: int) -> None:
    """Change a number of the emulated machine (csrc/tests/cuda_hardware.h, Emulation)."""
    if library().semeda_fast_emulation_set(name.encode(), ctypes.c_int64(value)):
        raise KeyError(name)


def get_number(name: str) -> int:
    value = ctypes.c_int64()
    if library().semeda_fast_emulation_get(name.encode(), ctypes.byref(value)):
        raise KeyError(name)
    return value.value


@contextlib.contextmanager
def machine(**numbers: int) -> Iterator[None]:
    """The emulated machine with other numbers."""
    before = {name: get_number(name) for name in numbers}
    try:
        for name, value in numbers.items():
            set_number(name, value)
        yield
    finally:
        for name, value in before.items():
            set_number(name, value)


class Memory:
    """Device memory: tensors between guard zones, outside of which nothing may be read or written."""

    ZONE = 512  # bytes; allocations of CUDA are aligned to as much
    MARK = 0xA5

    def __init__(self) -> None:
        self._all: list[tuple[str, Tensor, int]] = []
        library().semeda_fast_emulation_allow(None, ctypes.c_int64(0))

    def new(self, what: str, count: int, dtype: torch.dtype, poison: int) -> Tensor:
        """[count] of bytes `poison`, aligned to ZONE."""
        size = count * dtype.itemsize
        whole = torch.full((size + 3 * self.ZONE,), self.MARK, dtype=torch.uint8)
        begin = self.ZONE + -whole.data_ptr() % self.ZONE
        part = whole[begin : begin + size]
        part.fill_(poison)
        self._all.append((what, whole, begin))
        self._sizes = {**getattr(self, "_sizes", {}), what: size}
        library().semeda_fast_emulation_allow(ctypes.c_void_p(part.data_ptr()), ctypes.c_int64(size))
        return part.view(dtype)

    def like(self, what: str, tensor: Tensor, poison: int | None = None) -> Tensor:
        """A copy of the same strides, or poison of them."""
        made = self.new(what, tensor.untyped_storage().nbytes() // tensor.element_size(), tensor.dtype, poison or 0)
        if poison is None:
            made.copy_(torch.as_strided(tensor, made.shape, (1,), 0))
        offset = made.storage_offset() + tensor.storage_offset()
        return torch.as_strided(made, tensor.shape, tensor.stride(), offset)

    def check(self) -> None:
        for what, whole, begin in self._all:
            end = begin + self._sizes[what]
            for place, zone in (("in front of", whole[:begin]), ("behind", whole[end:])):
                assert bool((zone == self.MARK).all()), f"something was written {place} {what}"

    def forget(self) -> None:
        library().semeda_fast_emulation_allow(None, ctypes.c_int64(0))


class Result(NamedTuple):
    """What both directions wrote."""

    terms: Tensor  # [3 + L] fp32: ce, semeda, ce_weight, per_layer
    counts: Tensor  # [2] int64: valid, bad
    codes: Tensor  # bytes
    d_logits: Tensor

    def assert_same(self, other: Result, why: str) -> None:
        """Bit for bit."""
        for name, one, two in zip(self._fields, self, other, strict=True):
            same = torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
            assert same, f"{name} differs: {why}"


class Ran(NamedTuple):
    """The launch of the last direction that ran."""

    rows: int
    width: int
    strip_rows: int
    resident: int
    blocks: int
    tiles: int


def last_launch() -> Ran:
    return Ran(*(get_number(name) for name in Ran._fields))


def run(problem: Problem, poison: int = 0xFF, d_ce: float = D_CE, d_semeda: float = D_SEMEDA) -> Result:
    """Forward and backward; everything that they may write is bytes of `poison` before.

    Raises:
        RuntimeError: what the emulation found: a race, an access beside memory, a misaligned one.
        AssertionError: something was written beside the outputs.
    """
    module, memory = cuda_module(), Memory()
    try:
        placed, outputs = _forward(memory, problem, poison, with_codes=True)
        codes = outputs.codes
        kept = codes.clone()
        params, keep = fill(module, placed)
        ce_at = memory.like("d_ce", torch.tensor(float(d_ce)))
        semeda_at = memory.like("d_semeda", torch.tensor(float(d_semeda)))
        d_logits = memory.like("d_logits", problem.logits, poison)
        around = _between(d_logits, poison)
        add_gradients(module, params, ce_at, semeda_at, d_logits)
        params.codes = span(codes)
        space = memory.new("workspace of backward", module.workspace_bytes(params, 0), torch.uint8, poison)
        module.cuda_backward(params, span(space), 0, 0)
        del keep
        memory.check()
        assert torch.equal(kept, codes), "backward wrote to the codes"
        assert around == _between(d_logits, poison), "something was written between the elements of d_logits"
        for name in ("logits", "target", "valid", "class_weight", "flat"):
            given, now = getattr(problem, name), getattr(placed, name)
            same = given is None or torch.equal(given.nan_to_num(7), now.nan_to_num(7))
            assert same, f"{name}, an input, was changed"
        return outputs._replace(d_logits=d_logits.clone())
    finally:
        memory.forget()


def why_unsupported(problem: Problem) -> str:
    """Why the emulated machine cannot run it, or ""."""
    module = cuda_module()
    params, keep = fill(module, problem)
    del keep
    return str(module.why_unsupported(params, 0))


@contextlib.contextmanager
def least_memory(problem: Problem) -> Iterator[None]:
    """As little shared memory as the problem's tile takes: weights do not stay in it, but are copied for each layer."""
    with machine(shared_per_block=get_number("shared_per_block")):
        while not why_unsupported(problem):
            set_number("shared_per_block", get_number("shared_per_block") - 1024)
        set_number("shared_per_block", get_number("shared_per_block") + 1024)
        yield


def forward_alone(problem: Problem) -> tuple[Tensor, Tensor]:
    """Terms and counts where no codes are asked for."""
    memory = Memory()
    try:
        _, outputs = _forward(memory, problem, 0xFF, with_codes=False)
        memory.check()
        return outputs.terms, outputs.counts
    finally:
        memory.forget()


def _forward(memory: Memory, problem: Problem, poison: int, with_codes: bool) -> tuple[Problem, Result]:
    """The problem where it lies in the emulated memory, and what forward wrote."""
    module = cuda_module()
    placed = problem._replace(
        logits=memory.like("logits", problem.logits),
        target=memory.like("target", problem.target),
        valid=None if problem.valid is None else memory.like("valid", problem.valid),
        class_weight=None if problem.class_weight is None else memory.like("weight", problem.class_weight),
        flat=memory.like("flat", problem.flat),
    )
    params, keep = fill(module, placed)
    reason = module.why_unsupported(params, 0)
    if reason:
        raise ValueError(reason)
    terms = memory.new("terms", 3 + len(problem.config.sizes), torch.float32, poison)
    counts = memory.new("counts", 2, torch.int64, poison)
    codes = memory.new("codes", module.code_bytes(params), torch.uint8, poison)
    space = memory.new("workspace of forward", module.workspace_bytes(params, 0), torch.uint8, poison)
    params.terms, params.counts = span(terms), span(counts)
    params.codes = span(codes) if with_codes else None
    module.cuda_forward(params, span(space), 0, 0)
    del keep
    return placed, Result(terms, counts, codes, terms)


def _between(tensor: Tensor, poison: int) -> int:
    """How many bytes of a tensor's memory outside of its elements are still poison."""
    whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    free = torch.ones(whole.shape, dtype=torch.bool)
    torch.as_strided(free, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return int((whole[free].view(torch.uint8) == poison).sum())
