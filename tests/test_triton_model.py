"""The byte and FLOP model against figures worked out by hand, against what kernels write, and against the plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here", allow_module_level=True)

from benchmarks import labels as bench_labels
from benchmarks.workloads import PROXIES
from semeda_fast import EdgeProxy
from semeda_fast.backends.triton import INTERPRETER_TILE, interpreted
from semeda_fast.kernels import aot, bench, launch, model
from semeda_fast.kernels.launch import Launch
from semeda_fast.kernels.model import Work
from semeda_fast.kernels.plan import TILE, make_plan

SHAPE = (2, 8, 32)  # 512 pixels in 4 tiles
P = 512
HALO = 6 * 34 / 128 - 1  # a rim of one pixel around 4 x 32
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="counts what kernels do in Triton's interpreter")


def default_passes(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int, int] = SHAPE) -> list[list[Launch]]:
    return list(model.passes_of(model.make_config((21, 16, 32, 2)), dtype, shape=shape))


def work_named(launches: Sequence[Launch], name: str, mixed: float = 0.5) -> list[Work]:
    found = model.works(launches, mixed)
    return [work for one, work in zip(launches, found, strict=True) if one.kernel.__name__ == f"{name}_kernel"]


def test_softmax_by_hand() -> None:
    forward, _ = default_passes()
    (work,) = work_named(forward, "softmax_fwd")
    assert work == Work(
        read=P * 21 * 2 + P * 8,  # bf16 logits, int64 labels
        written=P * 32 * 2 + P + 4 * 4 * 4,  # e of 32 fp16 channels, labels of a byte, 4 sums in each of 4 tiles
    )


def test_tile_classes_prepare_and_reduction_by_hand() -> None:
    forward, backward = default_passes()
    (work,) = work_named(forward, "tile_class")
    # Reach 2: 8 x 36 pixels around 4 x 32; two layers have a target's branch.
    assert work == Work(read=P, written=2 * 4 * 2, cached=round(P * (8 * 36 / 128 - 1)))
    first, second, last = work_named(forward, "prepare")
    assert first == Work(read=4 * (9 * 21 * 16 + 16), written=2 * 9 * 32 * 16 + 4 * 16 + 22 * 16 * (4 + 2))
    assert second == Work(
        read=4 * (9 * 16 * 32 + 32) + 22 * 16 * 2, written=2 * 9 * 16 * 32 + 4 * 32 + 22 * 32 * (4 + 2)
    )
    assert last == Work(read=4 * (9 * 32 * 2 + 2), written=2 * 9 * 32 * 16 + 4 * 16)
    assert work_named(forward, "sum") == [Work(read=7 * 4 * 4, written=7 * 8)]
    assert work_named(forward, "finish") == [Work(read=7 * 8, written=6 * 4 + 2 * 8)]
    assert [work.written for work in work_named(backward, "prepare")] == [9280, 9344, 9280]  # packed and bias


def test_layers_forward_by_hand() -> None:
    forward, _ = default_passes()
    first, second, last = work_named(forward, "layer_fwd", mixed=0.5)
    weights = 2 * 9 * 32 * 16
    assert first == Work(
        # e, labels, the tiles' classes, table, weights, bias
        read=P * 32 * 2 + P + 4 * 2 + 22 * 16 * 4 + weights + 16 * 4,
        written=P * 16 * 2 + P * 16 * 2 // 2 + 3 * P * 2 + 4 * 4,  # b, aq on half of the tiles, 3 planes of 16 bits
        cached=round(HALO * P * 32 * 2 + 3 * weights),
        useful=3 * P * 9 * 21 * 16,  # 2 FLOP, one branch everywhere and one on half of the tiles
        executed=3 * P * 9 * 32 * 16,
    )
    weights = 2 * 9 * 16 * 32
    assert second == Work(
        # ... both layers' classes, the table before; features of the target on half of the tiles
        read=P * 16 * 2 * 3 // 2 + P + 2 * 4 * 2 + 22 * 16 * 2 + 22 * 32 * 4 + weights + 32 * 4,
        written=P * 32 * 2 + 3 * P * 4 + 4 * 4,
        cached=round(HALO * P * 16 * 2 * 3 // 2 + 3 * weights),
        useful=3 * P * 9 * 16 * 32,
        executed=3 * P * 9 * 16 * 32,
    )
    weights = 2 * 9 * 32 * 16
    assert last == Work(
        read=P * 32 * 2 + P + weights + 16 * 4,
        written=2 * P * 1 + 4 * 4,  # 2 planes of 8 bits
        cached=round(HALO * P * 32 * 2 + 3 * weights),
        useful=2 * P * 9 * 32 * 2,  # no target's branch under tap "pre"
        executed=2 * P * 9 * 32 * 16,
    )


def test_backward_by_hand() -> None:
    _, backward = default_passes()
    last, second = work_named(backward, "layer_bwd")
    weights = 2 * 9 * 32 * 16
    assert last == Work(
        read=2 * P + 3 * P * 4 + weights,  # codes of the last layer and of the one before
        written=P * 32 * 2,
        cached=round(HALO * 2 * P + 3 * weights),
        useful=2 * P * 9 * 32 * 2,
        executed=2 * P * 9 * 32 * 16,
    )
    assert second == Work(
        read=P * 32 * 2 + 3 * P * 2 + weights,  # d_t, and codes of the first layer alone
        written=P * 16 * 2,
        cached=round(HALO * P * 32 * 2 + 3 * weights),
        useful=2 * P * 9 * 16 * 32,
        executed=2 * P * 9 * 16 * 32,
    )
    (logits,) = work_named(backward, "logits_bwd")
    assert logits == Work(
        read=P * 21 * 2 + P * 8 + P * 16 * 2 + weights + 2 * 4,
        written=P * 21 * 2,
        cached=round(HALO * P * 16 * 2 + 3 * weights),
        useful=2 * P * 9 * 21 * 16,
        executed=2 * P * 9 * 32 * 16,
    )


def test_executed_counts_padded_pixels_and_three_products_for_one_of_fp32() -> None:
    forward, _ = default_passes(torch.float32, (1, 9, 33))  # 3 x 2 tiles of 128 pixels for 297
    last = work_named(forward, "layer_fwd")[-1]
    assert last.useful == 2 * 297 * 9 * 32 * 2
    assert last.executed == 3 * 2 * 6 * 128 * 9 * 32 * 16


def test_mixed_tiles_cost_the_targets_branch_alone() -> None:
    forward, _ = default_passes()
    none, every = (model.total(model.works(forward, share)) for share in (0.0, 1.0))
    # aq written and read once, 16 channels; one more pass through the first two layers
    assert every.bytes - none.bytes == 2 * P * 16 * 2
    assert every.useful - none.useful == 2 * P * 9 * (21 * 16 + 16 * 32)
    by_layer = model.total(model.works(forward, [1.0, 0.0]))
    assert by_layer.useful - none.useful == 2 * P * 9 * 21 * 16


@pytest.mark.parametrize("proxy", sorted(model.PLANNED))
def test_totals_are_of_the_planned_order(proxy: str) -> None:
    passes = model.passes_of(model.make_config((21, *model.PROXIES[proxy])), torch.bfloat16, shape=(16, 513, 513))
    work = model.total(one for launches in passes for one in model.works(launches))
    pixels = 16 * 513 * 513
    assert 0.5 * model.PLANNED[proxy] < work.bytes / pixels < 1.6 * model.PLANNED[proxy]
    # Each byte of logits twice, of the gradient once, and labels twice: the least of two passes.
    assert work.bytes / pixels > 3 * 21 * 2 + 2 * 8
    assert work.executed > work.useful


def test_proxies_are_those_of_the_benchmarks() -> None:
    assert {name: (*widths, last) for name, (widths, last) in PROXIES.items()} == model.PROXIES


def test_every_kernel_that_is_launched_has_a_model() -> None:
    kernels = {name: value for name, value in vars(launch).items() if name.endswith("_kernel")}
    assert set(model.ACCESS) == set(kernels)
    for name, access in model.ACCESS.items():
        known = set(kernels[name].arg_names)
        assert set(access.reads + access.writes) <= known
        assert set(access.mixed + access.shifted + access.weights) <= set(access.reads + access.writes)
    for _, config, dtype, soft, channels_last in aot.cases():
        for launches in model.passes_of(config, dtype, soft, channels_last):
            for one, work in zip(launches, model.works(launches), strict=True):
                assert work.read > 0
                assert work.written > 0
                assert (work.executed > 0) == ("KSIZE" in one.arguments)


def test_an_unknown_kernel_or_argument_is_refused() -> None:
    forward, _ = default_passes()
    one = forward[-1]

    def new_kernel() -> None:
        """Stands for a kernel that somebody adds."""

    with pytest.raises(ValueError, match="no model of kernel 'new_kernel'"):
        model.work_of(Launch(new_kernel, 1, one.arguments))
    with pytest.raises(ValueError, match="no model of argument 'more' of kernel 'finish_kernel'"):
        model.work_of(Launch(one.kernel, 1, {**one.arguments, "more": torch.zeros(1)}))


def changed_bytes(one: Launch, names: Sequence[str], fillings: Sequence[int]) -> int:
    """Bytes of the tensors that a run writes: elements that differ from what was there, for one of the fillings."""
    tensors = [one.arguments[name] for name in names if isinstance(one.arguments[name], Tensor)]
    changed = [torch.zeros(tensor.numel(), dtype=torch.bool) for tensor in tensors]
    for filling in fillings:
        for tensor in tensors:
            tensor.view(torch.uint8).fill_(filling)
        one.run()
        for mask, tensor in zip(changed, tensors, strict=True):
            mask |= (tensor.reshape(-1, 1).view(torch.uint8) != filling).any(dim=1)
    return sum(int(mask.sum()) * tensor.element_size() for mask, tensor in zip(changed, tensors, strict=True))


@needs_interpreter
@pytest.mark.parametrize(("distance", "side", "share"), [("l1", 3, 8 / 9), ("l2", 1, 1.0)])
def test_kernels_write_what_the_model_says(distance: str, side: int, share: float) -> None:
    """3 x 3 tiles of one class: the one in the middle is away from the image's border, so it is not mixed."""
    shape = (1, side * INTERPRETER_TILE[0], side * INTERPRETER_TILE[1])
    proxy = EdgeProxy(5, (16, 32), distance=distance)
    inputs = bench._inputs(proxy, *shape, torch.float32)
    inputs.target.fill_(3)
    plan = make_plan(bench._config(proxy), shape, torch.float32, False, INTERPRETER_TILE)
    forward, backward = bench._launched(plan, inputs)
    assert bench._mixed_shares(forward) == pytest.approx([share, share])
    for launches in (forward, backward):
        for one, work in zip(launches, model.works(launches, share), strict=True):
            writes = model.ACCESS[one.kernel.__name__].writes
            fillings = (0x5A, 0x25) if one.arguments.get("codes") is not None else (0x5A,)  # a code may be 0x5A
            assert changed_bytes(one, writes, fillings) == work.written, one.kernel.__name__


@needs_interpreter
def test_layer_cases_for_the_gpu_benchmark() -> None:
    proxy = EdgeProxy(5, (16, 32))
    shape = (1, 17, 66)
    cases = bench.layer_cases(proxy, *shape, torch.bfloat16)
    names = [case.name for case in cases]
    assert names == [
        "prepare forward", "softmax", "tile classes", "forward 1", "forward 2", "forward 3", "reduction",
        "prepare backward", "dgrad 3", "dgrad 2", "dgrad 1",
    ]  # fmt: skip
    dense = {"1": 5 * 16, "2": 16 * 32, "3": 32 * 2}
    for case in cases:
        kind, _, number = case.name.partition(" ")
        layer = kind in ("forward", "dgrad")
        assert case.flop == (2 * 9 * dense[number] * 17 * 66 if layer else 0)
        assert case.bytes > 0
        case.run()
    # No tile of this shape is away from the border, so all are mixed.
    assert INTERPRETER_TILE == (16, 64)
    pixels = 17 * 66
    forward_2 = cases[names.index("forward 2")]
    least = pixels * (2 * 16 * 2 + 1 + 32 * 2 + 3 * 4)  # both branches' inputs, labels, b, codes
    weights = 9 * 16 * 32 * 2 + 32 * 4 + 6 * (16 * 2 + 32 * 4)  # and bias, and tables
    assert least + weights <= forward_2.bytes <= least + weights + 100  # and a few bytes a tile


@needs_interpreter
def test_layer_cases_refuse_what_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"cannot be timed.*not torch.float64"):
        bench.layer_cases(EdgeProxy(5, (16, 32)), 1, 8, 8, torch.float64)
    with pytest.raises(ValueError, match=r"cannot be timed.*65 channels"):
        bench.layer_cases(EdgeProxy(5, (65,)), 1, 8, 8, torch.float32)


def test_command_prints_a_line_a_launch_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--proxy", "wide", "--dtype", "bf16", "--mixed", "0.25", "--shape", "1", "64", "64"]) == 0
    text = capsys.readouterr().out
    forward, backward = model.passes_of(model.make_config((21, 32, 64, 64)), torch.bfloat16, shape=(1, 64, 64))
    both = model.total([*model.works(forward, 0.25), *model.works(backward, 0.25)])
    assert f"{both.bytes / 4096:.1f}" in text
    assert "25 % mixed tiles" in text
    assert text.count("layer_fwd") == 3
    assert "planned: about 1500 B" in text
    with pytest.raises(SystemExit):
        model.main(["--mixed", "1.5"])
    assert "share in [0, 1], got 1.5" in capsys.readouterr().err


def test_share_of_mixed_tiles_is_that_of_street_scenes() -> None:
    if bench_labels.camvid_masks() is None:
        pytest.skip("CamVid masks are not here (see benchmarks/README.md)")
    target, _ = bench_labels.make_labels("camvid", 21, (4, 360, 480), 255, 7)
    n, h, w = target.shape
    rows, columns = TILE
    mixed = torch.ones(n, h // rows, w // columns, dtype=torch.bool)
    for y in range(1, mixed.shape[1] - 1):
        for x in range(1, mixed.shape[2] - 1):
            near = target[:, y * rows - 1 : (y + 1) * rows + 1, x * columns - 1 : (x + 1) * columns + 1].flatten(1)
            mixed[:, y, x] = near.amin(1) != near.amax(1)
    assert float(mixed.float().mean()) == pytest.approx(model.MIXED, abs=0.05)
