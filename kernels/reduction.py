"""Sums of the tiles' partial sums, in an order that depends on the number of tiles alone.

partial [rows, tiles] fp32     each row: cross-entropy, its divisor, valid pixels, bad targets, layer 1, 2, ...
sums    [rows]        fp64
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tiles"])
def sum_kernel(partial, sums, tiles, BLOCK: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < tiles:  # not range(): the interpreter takes no bound that is known at run time only
        at = start + i
        start += BLOCK
        total += tl.load(partial + row * tiles.to(tl.int64) + at, mask=at < tiles, other=0.0).to(tl.float64)
    tl.store(sums + row, tl.sum(total))


@triton.jit(do_not_specialize=["w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7"])
def finish_kernel(
    sums,  # [4 + LAYERS]
    terms,  # [3 + LAYERS] fp32: cross-entropy, SEMEDA, cross-entropy's divisor, each layer without its weight
    counts,  # [2] int64: valid pixels, those of a bad target
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,  # the layers' weights; scalars, since a tensor of them would have to be copied to the device
    LAYERS: tl.constexpr,
):
    """One program: the terms of the loss; SEMEDA is NaN where a label was bad."""
    bad = tl.load(sums + 3)
    weights = (w0, w1, w2, w3, w4, w5, w6, w7)
    semeda = bad * 0.0
    for layer in tl.static_range(LAYERS):
        term = tl.load(sums + 4 + layer)
        semeda += term * weights[layer]
        tl.store(terms + 3 + layer, term.to(tl.float32))
    tl.store(terms, tl.load(sums).to(tl.float32))
    tl.store(terms + 1, tl.where(bad > 0, float("nan"), semeda).to(tl.float32))
    tl.store(terms + 2, tl.load(sums + 1).to(tl.float32))
    tl.store(counts, tl.load(sums + 2).to(tl.int64))
    tl.store(counts + 1, bad.to(tl.int64))
