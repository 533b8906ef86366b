"""The emulated hardware under the CUDA kernels' bodies, against the PTX manual's formulas written down once more."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import cuda_machine
import numpy as np
import numpy.typing as npt
import pytest
import torch
from cuda_checks import Scene, problem_of
from cuda_machine import Memory, get_number, library, machine, run, set_number

pytestmark = pytest.mark.skipif(
    not os.environ.get(cuda_machine.VARIABLE), reason="the emulated CUDA kernels are not built here"
)
Array = npt.NDArray[Any]
LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4  # groupID and threadID_in_group of the manual


def call(name: str, *arguments: Array | int) -> int:
    """A function of csrc/tests/cuda_emulation_options.cpp; arrays go as addresses."""
    function = getattr(library(), f"semeda_fast_emulated_{name}")
    return int(function(*(a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments)))


def sums_as_fragment(c: Array) -> Array:
    """[16, 8] fp32 as registers [4][32]: PTX ISA, matrix fragments of mma.m16n8k16 and m16n8k8, accumulators."""
    return np.stack([c[GROUP + (8 if i >= 2 else 0), 2 * THREAD + (i & 1)] for i in range(4)])


@pytest.mark.parametrize("seed", range(3))
def test_product_of_fp16_has_the_documented_fragments(seed: int) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": elements a0..a7, b0..b3."""
    generator = np.random.default_rng(seed)
    a, b = (generator.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = generator.integers(-8, 9, (16, 8)).astype(np.float32)
    a_elements = np.zeros((8, 32), np.float16)
    for i in range(8):
        row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
        a_elements[i] = a[row, 2 * THREAD + (i & 1) + (8 if i >= 4 else 0)]
    b_elements = np.stack([b[2 * THREAD + (i & 1) + (8 if i >= 2 else 0), GROUP] for i in range(4)])
    sums = sums_as_fragment(c)
    before = get_number("products")
    call("multiply_f16", sums, packed(a_elements), packed(b_elements))
    assert get_number("products") == before + 1
    np.testing.assert_array_equal(sums, sums_as_fragment(c + a.astype(np.float32) @ b.astype(np.float32)))


def packed(elements: Array) -> Array:
    """[2 R][32] fp16 as registers [R][32]: the element of lower index in the lower half."""
    bits = elements.view(np.uint16).astype(np.uint32)
    return np.ascontiguousarray(bits[0::2] | bits[1::2] << 16)


@pytest.mark.parametrize("seed", range(3))
def test_product_of_tf32_has_the_documented_fragments(seed: int) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32: elements a0..a3, b0..b1."""
    generator = np.random.default_rng(seed)
    a, b = (generator.integers(-1023, 1024, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    c = generator.integers(-8, 9, (16, 8)).astype(np.float32)
    a_registers = np.stack([a[GROUP + (8 if i in (1, 3) else 0), THREAD + (4 if i >= 2 else 0)] for i in range(4)])
    b_registers = np.stack([b[THREAD + 4 * i, GROUP] for i in range(2)])
    sums = sums_as_fragment(c)
    assert call("multiply_tf32", sums, a_registers, b_registers) == 0
    np.testing.assert_array_equal(sums, sums_as_fragment(c + a @ b))


def test_product_of_tf32_refuses_what_tf32_does_not_hold() -> None:
    sums, a, b = (np.zeros((rows, 32), np.float32) for rows in (4, 4, 2))
    a[0, 0] = 1 + 2.0**-11
    assert call("multiply_tf32", sums, a, b) == -1
    a[0, 0] = 1 + 2.0**-10
    assert call("multiply_tf32", sums, a, b) == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("terms", "end"),
    [([0.75], 0), ([0.75] * 4, 3), ([-0.25], -0.5)],  # of 2^-23, the last bit of numbers from 1 to 2
)
def test_sums_of_products_are_cut_off_toward_zero(terms: list[float], end: float, sign: int) -> None:
    """Terms are added up as they are and the sum is cut off once: not to nearest, and not term by term."""
    sums, a = np.full((4, 32), sign, np.float32), np.zeros((4, 32), np.float32)
    for k, term in enumerate(terms):
        a[:2, k == THREAD] = sign * term * 2.0**-23
    call("multiply_tf32", sums, a, np.ones((2, 32), np.float32))
    np.testing.assert_array_equal(sums, np.full_like(sums, sign * (1 + end * 2.0**-23)))


def test_products_keep_infinity_and_nan() -> None:
    a, b = np.zeros((8, 32), np.float16), np.zeros((4, 32), np.float16)
    a[0, 0], a[2, 4] = np.inf, np.nan  # rows 0 and 9
    b[0] = 1
    sums = np.zeros((4, 32), np.float32)
    call("multiply_f16", sums, packed(a), packed(b))
    c = np.zeros((16, 8), np.float32)
    c[0], c[9] = np.inf, np.nan
    np.testing.assert_array_equal(sums, sums_as_fragment(c))


def test_matrix_load_is_the_documented_one() -> None:
    """PTX ISA, ldmatrix .x4: thread i names row i % 8 of matrix i / 8, and gets word i % 4 of row i / 4 of each."""
    words = np.random.default_rng(0).integers(0, 2**32, 1024, dtype=np.uint32)
    rows = 16 * np.random.default_rng(1).permutation(256)[:32].astype(np.int32)
    registers = np.zeros((4, 32), np.uint32)
    call("load_matrices", words, 4096, rows, registers)
    expected = np.stack([words[rows[8 * matrix + LANES // 4] // 4 + LANES % 4] for matrix in range(4)])
    np.testing.assert_array_equal(registers, expected)


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffle(mask: int) -> None:
    value, other = np.random.default_rng(mask).integers(0, 2**32, 32, dtype=np.uint32), np.zeros(32, np.uint32)
    call("shuffle_xor", value, mask, other)
    np.testing.assert_array_equal(other, value[LANES ^ mask])


def hard_floats() -> Array:
    """Halves, midpoints of two, their neighbours, and bits at random: both signs, subnormals, inf and NaN."""
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
    positive = np.sort(halves[np.isfinite(halves) & (halves >= 0)])
    middle = ((positive[:-1].astype(np.float64) + positive[1:]) / 2).astype(np.float32)
    near = np.concatenate([halves, middle, -middle, np.array([65520.0, 65519.996, 3.4e38, 1e-45], np.float32)])
    bits = near.view(np.uint32)
    short = (np.arange(65536, dtype=np.uint32) << 16)[:, None] + np.array([0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    tf32 = (np.arange(2**19, dtype=np.uint32) << 13)[::7, None] + np.array([0xFFF, 0x1000, 0x1001, 0], np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    return np.concatenate([bits, bits + 1, bits - 1, short.ravel(), tf32.ravel(), random]).view(np.float32)


def rounded(name: str, values: Array, dtype: Any) -> Array:
    found = np.zeros(values.shape, dtype)
    call(name, np.ascontiguousarray(values), found, ctypes.c_int64(values.size))  # type: ignore[arg-type]
    return found


def assert_same_numbers(found: Array, exact: Array) -> None:
    """Bit for bit, zeros with their sign; any NaN for a NaN."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    number = ~np.isnan(exact)
    np.testing.assert_array_equal(found[number].view(f"u{found.itemsize}"), exact[number].view(f"u{exact.itemsize}"))


def test_every_half_is_read() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    assert_same_numbers(rounded("from_half", bits, np.float32), bits.view(np.float16).astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_rounding_to_half() -> None:
    values = hard_floats()
    assert_same_numbers(rounded("to_half", values, np.uint16).view(np.float16), values.astype(np.float16))


def test_rounding_to_bfloat() -> None:
    values = hard_floats()
    exact = torch.from_numpy(values).bfloat16().float().numpy()
    found = rounded("to_bfloat", values, np.uint16).astype(np.uint32) << 16
    assert_same_numbers(found.view(np.float32), exact)


def test_rounding_to_tf32() -> None:
    """cvt.rna.tf32.f32: 10 bits of mantissa, ties away from zero; by arithmetic, where the C++ works on bits."""
    values = hard_floats()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    exponent = np.maximum(np.frexp(np.where(finite, wide, 0.0))[1] - 1, -126)
    unit = np.ldexp(1.0, exponent - 10)
    exact = np.where(finite, np.copysign(np.floor(np.abs(wide) / unit + 0.5) * unit, wide), wide)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_numbers(rounded("to_tf32", values, np.float32), exact.astype(np.float32))


LOAD, STORE, BARRIER = 0, 1, 2
ALL = (BARRIER, 0, 0)


def accesses(*script: tuple[int, int, int], size: int = 64) -> str:
    """What the emulation says to accesses (what, thread, offset) of 4 bytes."""
    flat = np.array(script, np.int32).ravel()
    found = library().semeda_fast_emulated_accesses(size, flat.ctypes.data_as(ctypes.c_void_p), len(script))
    return str(found.decode())


RACES: dict[str, Sequence[tuple[int, int, int]]] = {
    "read of what another thread writes": [(STORE, 1, 8), (LOAD, 2, 8)],
    "write of what another thread reads": [(LOAD, 1, 8), (STORE, 2, 8)],
    "two writes": [(STORE, 1, 8), (STORE, 2, 8)],
}


@pytest.mark.parametrize("what", RACES)
def test_a_race_within_a_phase_is_found_whatever_the_order(what: str) -> None:
    first, second = RACES[what]
    assert what in accesses(first, second)
    assert "threads 1 and 2" in accesses(first, second)
    assert accesses(second, first)
    assert accesses(first, ALL, second) == ""
    assert what in accesses(ALL, (STORE, 3, 0), ALL, first, second, ALL)


def test_what_is_no_race() -> None:
    assert accesses((STORE, 1, 8), (LOAD, 1, 8), (STORE, 1, 8)) == ""  # a thread with itself
    assert accesses((LOAD, 1, 8), (LOAD, 2, 8)) == ""
    assert accesses((STORE, 1, 8), (STORE, 2, 12), (LOAD, 1, 4), (LOAD, 2, 0)) == ""  # beside each other
    assert accesses((STORE, 1, 8), ALL, (LOAD, 2, 8), (LOAD, 3, 8), ALL, (STORE, 3, 8)) == ""


def test_a_reader_among_several_is_remembered() -> None:
    """The writer being the last of the readers must not hide the others."""
    assert "write of what" in accesses((LOAD, 1, 8), (LOAD, 2, 8), (STORE, 2, 8))
    assert "write of what" in accesses((LOAD, 1, 8), (LOAD, 2, 8), (LOAD, 1, 8), (STORE, 1, 8))


def test_shared_memory_has_an_end_and_an_alignment() -> None:
    assert accesses((STORE, 1, 60)) == ""
    assert "4 bytes at 64 of 64" in accesses((STORE, 1, 64))
    assert "at -4" in accesses((LOAD, 1, -4))
    assert "at 6" in accesses((LOAD, 1, 6))


def test_shared_memory_starts_as_nan() -> None:
    for offset in (0, 4, 4092):
        bits = np.array([library().semeda_fast_emulated_poison(4096, offset)], np.uint32)
        assert np.isnan(bits.view(np.float32)).all()
        assert np.isnan(bits.view(np.float16)).all()


def test_a_barrier_that_is_dropped_is_no_barrier() -> None:
    script = [(STORE, 1, 8), ALL, (LOAD, 2, 8), ALL, (STORE, 1, 8)]
    assert accesses(*script) == ""
    for number, what in enumerate(("read of what", "write of what")):
        with machine(drop_barrier=number):
            assert what in accesses(*script)
    with machine(drop_barrier=2):
        assert accesses(*script) == ""


def test_numbers_of_the_machine_have_names() -> None:
    before = get_number("multiprocessors")
    with machine(multiprocessors=before + 1):
        assert get_number("multiprocessors") == before + 1
    assert get_number("multiprocessors") == before
    for unknown in (lambda: get_number("sm"), lambda: set_number("sm", 1)):
        with pytest.raises(KeyError, match="sm"):
            unknown()


SMALL = Scene(h=5, w=7)


def test_a_read_beside_device_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Memory.new

    def short(self: Memory, what: str, count: int, *rest: Any) -> torch.Tensor:
        if what != "logits":
            return whole(self, what, count, *rest)
        return torch.empty(count, dtype=rest[0])  # memory that the emulation was not told of

    run(problem_of(SMALL))
    monkeypatch.setattr(Memory, "new", short)
    with pytest.raises(RuntimeError, match="device memory: a read of 2 bytes"):
        run(problem_of(SMALL))


@pytest.mark.parametrize("where", [-1, 12])
def test_a_write_beside_device_memory_is_found(where: int) -> None:
    memory = Memory()
    made = memory.new("codes", 12, torch.uint8, 0)
    memory.check()
    torch.as_strided(made, (1,), (1,), made.storage_offset() + where).fill_(1)
    with pytest.raises(AssertionError, match=r"was written (in front of|behind) codes"):
        memory.check()
    memory.forget()


def test_the_machine_forgets_a_race() -> None:
    """One run's race must not fail the next."""
    with machine(drop_barrier=1, drop_kernel=1), pytest.raises(RuntimeError, match="a race"):
        run(problem_of(SMALL))
    run(problem_of(SMALL))


def test_a_tile_that_does_not_fit_is_refused() -> None:
    with machine(shared_per_block=8 << 10), pytest.raises(ValueError, match="more shared memory"):
        run(problem_of(SMALL))
