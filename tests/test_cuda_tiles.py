"""The comparison of tiles and strips on paper (benchmarks/gpu/cuda_tiles.py) counts what the kernels' plan takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cuda_machine
from helpers import make_proxy

from benchmarks.gpu import cuda_tiles
from semeda_fast.backends.config import config_text, parse_config
from semeda_fast.backends.native import cuda_module
from semeda_fast.backends.params import describe
from semeda_fast.spec import LossSpec

PROXIES = {(16, 32): 2, (16, 32, 32): 2, (32, 64): 64}


@pytest.mark.skipif(not os.environ.get(cuda_machine.VARIABLE), reason="the emulated CUDA kernels are not built here")
@pytest.mark.parametrize("widths", PROXIES)
@pytest.mark.parametrize(("rows", "width"), cuda_tiles.TILES)
def test_shared_memory_is_the_plans(widths: tuple[int, ...], rows: int, width: int) -> None:
    proxy = make_proxy(21, widths=widths, edge_classes=PROXIES[widths])
    ones = (1,) * proxy.num_layers
    spec = LossSpec((1.0,) * proxy.num_layers, (1.0,) * proxy.num_layers, ones, ones, (0,) * proxy.num_layers)
    params = describe(cuda_module(), parse_config(config_text(proxy.weights, spec, False)), torch.float16)
    plenty = {"shared_per_block": 1 << 20, "shared_per_multiprocessor": 1 << 20}  # so that weights stay
    with cuda_machine.machine(tile_rows=rows, tile_width=width, **plenty):
        plan = cuda_module().plan(params, 0, False)
    assert plan["resident"]
    modelled = cuda_tiles.tile((21, *widths, PROXIES[widths]), rows, width).shared
    assert modelled == pytest.approx(plan["shared"], rel=0.01)


def test_fewer_pixels_twice_in_strips_more_barriers_in_small_steps() -> None:
    default = (21, 16, 32, 2)
    tile, small, large = (
        cuda_tiles.tile(default, 16, 32),
        cuda_tiles.strip(default, 4, 64),
        cuda_tiles.strip(default, 8, 64),
    )
    assert small.products == large.products < tile.products
    assert small.softmax < tile.softmax
    assert small.barriers == 2 * large.barriers > tile.barriers
    assert large.shared > tile.shared > small.shared
    assert "| tile 16 x 28 |" in cuda_tiles.table(default)
