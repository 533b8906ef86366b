"""Memory for the fuzzer of native entries: blocks as large as a tensor is, and what can be wrong with them.

Blocks come from malloc, so that the address sanitizer has its red zones right behind each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

F32, BF16, F16, U8, I8, I16, I32, I64, U16 = range(9)  # DType of csrc/params.h
ELEMENT = (4, 2, 2, 1, 1, 2, 4, 8, 2)
FLOATS, INTEGERS = (F32, BF16, F16), (U8, I8, I16, I32, I64, U16)
HUGE = 2**61

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Arena:
    """The blocks of one call, filled with one byte; a context that gives them back."""

    def __init__(self, fill: int) -> None:
        self._fill, self._blocks = fill, list[int]()

    def block(self, num_bytes: int) -> int:
        address = _libc.malloc(num_bytes)
        if not address:
            raise MemoryError(f"malloc({num_bytes})")
        self._blocks.append(address)
        ctypes.memset(address, self._fill, num_bytes)
        return int(address)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        for address in self._blocks:
            _libc.free(address)


@dataclass(frozen=True)
class Memory:
    """Contiguous memory that an entry takes as (address, bytes), or as None."""

    num_bytes: int
    element: int = 4
    optional: bool = False
    missing: int = 0  # bytes that are not there
    null: bool = False
    shift: int = 0  # bytes by which the address is off
    absent: bool = False

    def make(self, arena: Arena) -> tuple[int, int] | None:
        if self.absent:
            return None
        there = max(self.num_bytes - self.missing, 0)
        return (0 if self.null else arena.block(there + self.shift) + self.shift), there

    def faults(self) -> Iterator[tuple[str, Memory]]:
        """Each has one thing wrong."""
        if self.absent or not self.num_bytes:
            return
        yield "a byte short", replace(self, missing=1)
        yield "an element short", replace(self, missing=self.element)
        yield "empty", replace(self, missing=self.num_bytes)
        yield "null", replace(self, null=True)
        yield "null and empty", replace(self, null=True, missing=self.num_bytes)
        if self.element > 1:
            yield "misaligned", replace(self, shift=1)
        if not self.optional:
            yield "absent", replace(self, absent=True)


@dataclass(frozen=True)
class Tensor:
    """A strided view [n, c, h, w] at the end of a block as small as its strides allow."""

    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: int
    dtypes: tuple[int, ...]  # that an entry takes here
    missing: int = 0
    null: bool = False
    shift: int = 0
    offset_error: int = 0
    stated_strides: tuple[int, int, int, int] | None = None
    stated_dtype: int | None = None
    groups: tuple[int, int] = (0, 0)  # fold and outer of View

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def front(self) -> int:
        """Elements in front of the address, which negative strides reach."""
        return sum((size - 1) * -stride for size, stride in zip(self.sizes, self.strides, strict=True) if stride < 0)

    @property
    def num_bytes(self) -> int:
        if not self.numel:
            return 0
        behind = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True) if stride > 0)
        return (self.front + behind + 1) * ELEMENT[self.dtype]

    def place(self, arena: Arena) -> tuple[int, int, int]:
        """Address, offset and bytes of the storage."""
        there = max(self.num_bytes - self.missing, 0)
        front = self.front if self.numel else 0
        address = arena.block(there + self.shift) + self.shift + front * ELEMENT[self.dtype]
        return (0 if self.null else address), front + self.offset_error, there

    def view(self, arena: Arena) -> tuple[int, int, list[int], int, int, int, int]:
        """The arguments of `View`."""
        address, offset, there = self.place(arena)
        dtype = self.dtype if self.stated_dtype is None else self.stated_dtype
        return address, dtype, list(self.stated_strides or self.strides), offset, there, *self.groups

    def faults(self, placed: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Each has one thing wrong; `placed` where strides and dtype are no part of what is handed over."""
        if not self.numel:
            return
        yield "a byte short", replace(self, missing=1)
        yield "an element short", replace(self, missing=ELEMENT[self.dtype])
        yield "empty", replace(self, missing=self.num_bytes)
        yield "null", replace(self, null=True)
        yield "null and empty", replace(self, null=True, missing=self.num_bytes)
        yield "an offset too large", replace(self, offset_error=1)
        yield "a negative offset", replace(self, offset_error=-self.front - 1)
        yield "a huge offset", replace(self, offset_error=HUGE)
        if ELEMENT[self.dtype] > 1:
            yield "misaligned", replace(self, shift=1)
        if placed:
            return
        for i, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            for what, wrong in (("huge", HUGE), ("hugely negative", -HUGE)):
                yield f"a {what} stride {i}", self._with_stride(i, wrong)
            if size == 1:
                continue
            yield f"stride {i} too large", self._with_stride(i, stride - 1 if stride < 0 else stride + 1)
            if stride:
                yield f"stride {i} negated", self._with_stride(i, -stride)
        n, step = self.sizes[0], self.strides[0]
        yield "a negative number of groups", replace(self, groups=(-1, step))
        yield "groups that do not divide the images", replace(self, groups=(2**40, step))
        if n > 1:
            yield "groups too far apart", replace(self, groups=(1, step - 1 if step < 0 else step + 1))
            yield "groups hugely far apart", replace(self, groups=(1, HUGE))
        for dtype in (-1, len(ELEMENT), 2**31 - 1, -(2**31)):
            yield f"dtype {dtype}", replace(self, stated_dtype=dtype)
        wrong = [dtype for dtype in range(len(ELEMENT)) if dtype not in self.dtypes]
        wider = [dtype for dtype in self.dtypes if ELEMENT[dtype] > ELEMENT[self.dtype]]
        for dtype in (*wrong, *wider):
            yield f"dtype {dtype} for {self.dtype}", replace(self, stated_dtype=dtype)

    def _with_stride(self, i: int, stride: int) -> Tensor:
        strides = list(self.strides)
        strides[i] = stride
        return replace(self, stated_strides=(strides[0], strides[1], strides[2], strides[3]))


def strides_of(sizes: tuple[int, int, int, int], layout: str) -> tuple[int, int, int, int]:
    """Strides of one of LAYOUTS."""
    _, c, h, w = sizes
    by_layout: dict[str, tuple[int, int, int, int]] = {
        "nchw": (c * h * w, h * w, w, 1),
        "channels_last": (c * h * w, 1, w * c, c),
        "transposed": (c * h * w, h * w, 1, h),
        "spaced": (2 * c * h * w + 3, 2 * h * w, 2 * w, 2),
        "flipped": (c * h * w, h * w, -w, -1),
        "backwards": (-c * h * w, -h * w, w, 1),
        "expanded": (0, h * w, w, 1),
        "one value": (0, 0, 0, 0),
    }
    return by_layout[layout]


LAYOUTS = ("nchw", "channels_last", "transposed", "spaced", "flipped", "backwards", "expanded", "one value")
WRITTEN = LAYOUTS[:6]  # each element has a place of its own
