"""The Triton kernels in Triton's interpreter, with the tile that a GPU gets, against the float64 reference.

Every buffer of every launch lies between guard zones of NaN here: a write outside is caught, a read outside shows. Each
program costs some 30 ms whatever its size, so most images have few tiles, and `large` cases, on which tiles of one
class lie beside computed ones, are few. SEMEDA_FAST_INTERPRETER=full runs all combinations.
"""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import pytest
import torch
from cpu_budget import loss_and_grad
from helpers import VOID, assert_within_budget, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends import triton as triton_ops
from semeda_fast.backends.config import FusedConfig
from semeda_fast.proxy.record import ProxyLayer

pytest.importorskip("triton")
if not triton_ops.interpreted():
    pytest.skip("these tests run where there is no GPU, in Triton's interpreter", allow_module_level=True)


from semeda_fast.kernels import launch as launch_module
from semeda_fast.kernels import plan as plan_module

FULL = os.environ.get("SEMEDA_FAST_INTERPRETER") == "full"
GUARD = 1 << 14  # elements on either side: more than two rows of 64 channels of any image here
CALLERS = ("logits", "target", "valid", "class_weight")
C = 5


class Guarded:
    """A copy of a tensor, strides included, between guard zones; bytes of 0xFF are NaN in every float type."""

    def __init__(self, original: Tensor) -> None:
        self.original = original
        span = 1 + sum((size - 1) * stride for size, stride in zip(original.shape, original.stride(), strict=True))
        memory = torch.empty(span + 2 * GUARD, dtype=original.dtype)
        self.bytes = memory.view(torch.uint8).view(-1, original.itemsize)
        self.bytes.fill_(0xFF)
        self.view = memory.as_strided(original.shape, original.stride(), GUARD)
        self.view.copy_(original)
        self.before = self.bytes.clone()
        self.outside = torch.ones(memory.shape, dtype=torch.bool)
        self.outside.as_strided(original.shape, original.stride(), GUARD).fill_(False)

    def check(self, name: str) -> None:
        """AssertionError where a guard, or a caller's tensor, was written to; copies what else was back."""
        where = self.outside | True if name in CALLERS else self.outside
        touched = (self.bytes != self.before).any(dim=1) & where
        assert not touched.any(), f"{name}: wrote to elements {(touched.nonzero() - GUARD).flatten()[:8].tolist()}"
        if name not in CALLERS:
            self.original.copy_(self.view)


def run_guarded(launch: Any) -> None:
    """`Launch.run` between guard zones."""
    if not launch.programs:
        return
    guards = {
        name: Guarded(value)
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and value.numel() and all(value.stride())
    }
    arguments = {**launch.arguments, **{name: guard.view for name, guard in guards.items()}}
    launch.kernel[(launch.programs,)](**arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)
    for name, guard in guards.items():
        try:
            guard.check(name)
        except AssertionError as error:
            raise AssertionError(f"{launch.kernel.__name__}: {error}") from None


@pytest.fixture
def real_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile of a GPU, and guard zones around each buffer."""
    monkeypatch.setattr(triton_ops, "INTERPRETER_TILE", plan_module.TILE)
    monkeypatch.setattr(launch_module.Launch, "run", run_guarded)


def mixed_proxy(channels: tuple[int, ...], sizes: tuple[int, ...], tap: str, distance: str) -> EdgeProxy:
    """Random weights, biases and scales, and a kernel size of its own for each layer."""
    generator = torch.Generator().manual_seed(3)
    layers = [ProxyLayer(a, b, k) for a, b, k in zip(channels, channels[1:], sizes, strict=False)]
    shapes = [(layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size) for layer in layers]
    weights = [torch.randn(s, generator=generator) / (s[1] * s[2] * s[3]) ** 0.5 for s in shapes]
    biases = [0.1 * torch.randn(s[0], generator=generator) for s in shapes]
    scales = {distance: [0.5 + 0.2 * number for number in range(len(layers))]}
    return EdgeProxy.from_tensors(layers, weights, biases, tap=tap, distance=distance, scales=scales)


def regions(kind: str) -> Tensor:
    """Labels [1,14,70], 4 x 3 tiles; only tiles (1,1) and (2,1) are off the image's border."""
    target = torch.full((1, 14, 70), 3)
    target[0, :, 60:] = 1
    target[0, 0, ::3] = 4
    if kind == "row":  # one class one row below tile (1,1), not two: a table in the first layer, products in the second
        target[0, 2:9, 28:68] = 2
    elif kind == "corner":  # the far corner of what tile (1,1) sees in the second layer; (2,1) has a table in both
        target[0, 1:, 28:68] = 2
        target[0, 2, 30] = 0
    else:  # void is a region like another
        target[0, :, 28:68] = VOID
        target[0, 2, 30] = 0
    return target


class Problem(NamedTuple):
    """One case of the table below; `target` is a kind of `regions`, or a share of void pixels, "soft" or "soft1"."""

    target: str = "blocks"
    shape: tuple[int, ...] = (1, C, 5, 37)
    dtype: torch.dtype = torch.float32
    labels: torch.dtype = torch.int64
    channels: tuple[int, ...] = (16, 32, 2)
    sizes: tuple[int, ...] = (3, 3, 3)
    tap: str = "pre"
    distance: str = "l1"
    layout: str = "nchw"
    options: dict[str, Any] = {}  # noqa: RUF012  # never written to
    mask: bool = False


half, brain = torch.float16, torch.bfloat16
LARGE = (1, C, 14, 70)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
PROBLEMS = {
    "large-fp32": Problem("corner", LARGE, labels=torch.uint8),
    "large-bf16-void-mask": Problem("void", LARGE, brain, labels=torch.int16, mask=True),
    "large-fp16-channels_last-post-smooth_l1-sum": Problem(
        "row", LARGE, half, tap="post", distance="smooth_l1", layout="channels_last", channels=(16, 2), sizes=(3, 3),
        options={"reduction": "sum"},
    ),
    "large-post-l2-none-weight-smoothing-4-layers-mixed-sizes": Problem(
        "row", LARGE, channels=(16, 48, 8, 3), sizes=(1, 3, 1, 1), tap="post", distance="l2",
        options={"reduction": "none", "weight": WEIGHT, "label_smoothing": 0.1},
    ),
    "64-channels-2-layers-5": Problem("void", (1, C, 3, 33), channels=(64, 64), sizes=(5, 3), tap="post"),
    "48-channels-bf16": Problem(shape=(2, C, 3, 19), dtype=brain, channels=(48, 48, 2), distance="l2"),
    "one-class": Problem("one", (1, C, 10, 66), labels=torch.int8, options={"ignore_index": -100}, sizes=(3, 1, 1)),
    "soft-bf16-smoothing": Problem("soft", dtype=brain, distance="smooth_l1", options={"label_smoothing": 0.2}),
    "soft-mask-weight-none": Problem(
        "soft", (1, C, 3, 33), mask=True, tap="post", options={"weight": WEIGHT, "reduction": "none"}
    ),
    "binary-bool": Problem("binary", (2, 1, 5, 7), labels=torch.bool, options={"mode": "binary"}),
    "binary-soft1": Problem("soft1", (1, 1, 3, 37), dtype=half, options={"mode": "binary"}),
    "binary-soft2": Problem("soft2", (2, 1, 3, 7), options={"mode": "binary", "reduction": "sum"}),
    "150-classes": Problem(shape=(1, 150, 3, 35), channels=(16, 8, 2), sizes=(3, 1, 1)),
    "256-classes-bf16-channels_last": Problem(
        shape=(1, 256, 2, 33), dtype=brain, layout="channels_last", channels=(16, 2), sizes=(3, 1)
    ),
    "40-classes-uint8-no-ignored-label": Problem(
        shape=(1, 40, 2, 7), labels=torch.uint8, options={"ignore_index": -217}  # class 39 in a byte
    ),
    "1x1": Problem(shape=(1, C, 1, 1), options={"ignore_index": 7}),
    "1x70-minus-infinity": Problem("inf", (1, C, 1, 70)),
    "7x1-minus-infinity-none": Problem("inf", (3, C, 7, 1), options={"reduction": "none"}, distance="l2"),
}  # fmt: skip


def build(problem: Problem) -> tuple[Tensor, Tensor, EdgeProxy, dict[str, Any]]:
    """Logits, target, proxy and options of the loss."""
    n, c, h, w = problem.shape
    options = {"ignore_index": VOID, **problem.options}
    binary = options.get("mode") == "binary"
    classes = 2 if binary else c
    void = 0.2 if options["ignore_index"] == VOID and c != 256 and problem.labels != torch.bool else 0.0
    logits, target = make_inputs(n, c, h, w, void=void, num_labels=classes, seed=5)
    proxy = mixed_proxy((classes, *problem.channels), problem.sizes, problem.tap, problem.distance)
    generator = torch.Generator().manual_seed(11)
    if problem.target in ("row", "corner", "void"):
        target = regions(problem.target)[:, :h, :w]
    elif problem.target == "one":
        target = torch.full((n, h, w), 4)
    elif problem.target.startswith("soft"):
        channels = {"soft": c, "soft1": 1, "soft2": 2}[problem.target]
        target = torch.rand((n, channels, h, w), generator=generator)
        target = target if channels == 1 else target / target.sum(1, keepdim=True)
    elif problem.target == "inf":
        keep = torch.zeros(problem.shape).scatter_(1, target.where(target != VOID, 0).unsqueeze(1), 1.0) > 0
        gone = (torch.rand(problem.shape, generator=generator) < 0.3) & ~keep
        logits = logits.detach().masked_fill(gone, float("-inf"))
    if not target.is_floating_point():
        target = target.to(problem.labels)
    order = torch.channels_last if problem.layout == "channels_last" else torch.contiguous_format
    logits = logits.detach().to(problem.dtype).contiguous(memory_format=order)
    if problem.mask:
        options["valid_mask"] = torch.rand((n, h, w), generator=generator) > 0.3
        options["valid_mask"][:, :, 28:60] |= True
    return logits, target, proxy, options


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("real_tile")
def test_value_and_gradient_keep_the_budget(name: str) -> None:
    logits, target, proxy, options = build(PROBLEMS[name])
    assert_within_budget(logits, target, proxy, "triton", **options)


@pytest.mark.skipif(not FULL, reason="minutes: SEMEDA_FAST_INTERPRETER=full runs it")
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("kind", ["row", "corner", "void", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, half, brain], ids=["fp32", "fp16", "bf16"])
@pytest.mark.usefixtures("real_tile")
def test_all_combinations_keep_the_budget(kind: str, dtype: torch.dtype, tap: str, distance: str) -> None:
    for reduction, layout in (("mean", "nchw"), ("none", "channels_last")):
        problem = Problem(kind, LARGE, dtype, tap=tap, distance=distance, layout=layout, mask=reduction == "none")
        logits, target, proxy, options = build(problem)
        assert_within_budget(logits, target, proxy, "triton", **{**options, "reduction": reduction})


@pytest.mark.parametrize("name", ["logits", "d_logits"])
def test_guards_see_what_is_written_outside(name: str) -> None:
    planar = torch.zeros(2, 3, 4, 5)
    for tensor in (planar, planar[:, ::2, :, 1:4], planar.contiguous(memory_format=torch.channels_last)):
        guarded = Guarded(tensor)
        guarded.check(name)
        guarded.view[1, 1, 2, 2] = 1.0
        if name in CALLERS:
            with pytest.raises(AssertionError, match="wrote to"):
                guarded.check(name)
            continue
        guarded.check(name)
        assert tensor[1, 1, 2, 2] == 1.0
        for offset in (-1, -GUARD, 2 * 3 * 4 * 5 if tensor.numel() == planar.numel() else 1):
            guarded = Guarded(tensor)
            if offset == 1:  # a hole of the slice: column 4 of the last row
                offset = tensor.stride(2) - 2
            guarded.view.as_strided((1,), (1,), GUARD + offset).fill_(1.0)
            with pytest.raises(AssertionError, match="wrote to"):
                guarded.check(name)


@pytest.mark.usefixtures("real_tile")
def test_the_layout_changes_no_bit() -> None:
    logits, target, proxy, options = build(Problem(shape=(2, C, 3, 21), dtype=brain))
    wide = torch.full((2, 2 * C, 5, 80), float("nan"), dtype=brain)
    sliced = wide[:, ::2, 1:4, 3:45:2]
    sliced.copy_(logits)
    expected = loss_and_grad(logits, target, proxy, "triton", **options)
    for other in (sliced, logits.contiguous(memory_format=torch.channels_last)):
        strided_target = target.repeat_interleave(2, dim=2)[:, :, ::2]
        found = loss_and_grad(other, strided_target, proxy, "triton", **options)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.usefixtures("real_tile")
@pytest.mark.parametrize("target", ["blocks", "soft"])
def test_two_runs_give_the_same_bits_and_no_memory_is_read_before_it_is_written(target: str) -> None:
    """The second run finds NaN in all fresh memory. 70 classes: more tiles in one kernel than in the others."""
    problem = Problem(target, (1, 70, 3, 33), channels=(16, 8), sizes=(3, 1), tap="post", distance="smooth_l1")
    logits, labels, proxy, options = build(problem)
    first = loss_and_grad(logits, labels, proxy, "triton", **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert logits.new_empty(3).isnan().all(), "torch no longer fills fresh memory"
        second = loss_and_grad(logits, labels, proxy, "triton", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad, second.grad)


def test_bad_labels_and_void_pixels(real_tile: None) -> None:
    """NaN under void pixels reaches nothing; a label that is no class gives NaN where nobody checks."""
    logits, target, proxy, options = build(Problem(shape=(1, C, 3, 7)))
    void = target == VOID
    assert void.any()
    clean = loss_and_grad(logits, target, proxy, "triton", **options)
    poisoned = logits.masked_fill(void.unsqueeze(1), float("nan"))
    found = loss_and_grad(poisoned, target, proxy, "triton", **options)
    assert torch.equal(found.loss, clean.loss)
    assert torch.equal(found.grad, clean.grad)
    assert not found.grad.masked_select(void.unsqueeze(1)).any()
    target[0, 1, 2] = C
    found = loss_and_grad(logits, target, proxy, "triton", validate="never", **options)
    assert found.loss.isnan()
    assert found.grad[0, :, 1, 2].isnan().all()


def forward(plan: Any, inputs: Any, elide: bool) -> dict[str, Tensor]:
    """Terms, codes and classes of tiles of a forward pass."""
    outputs: dict[str, Any] = {
        "terms": torch.empty(3 + len(plan.layers)),
        "counts": torch.empty(2, dtype=torch.int64),
        "codes": torch.zeros(plan.code_offsets[-1], dtype=torch.uint8),
        "saved": torch.empty(0),
        "ce_map": None,
        "semeda_map": None,
    }
    for launch in launch_module.forward_launches(plan, inputs, outputs, "ieee"):
        run_guarded(launch)
        if launch.kernel.__name__ == "tile_class_kernel":
            outputs["classes"] = launch.arguments["classes"].clone()
            if not elide:
                launch.arguments["classes"].fill_(-1)
    return outputs


def flat_parameters(proxy: EdgeProxy) -> Tensor:
    """As the operators take them."""
    return torch.cat([tensor.reshape(-1) for tensor in (*proxy.weights, *proxy.biases)])


def test_tables_agree_with_products() -> None:
    """The same loss and codes whether tiles of one class are looked up or computed."""
    proxy = mixed_proxy((C, 16, 16, 2), (3, 3, 1), "pre", "l1")
    config = make_config(channels=(C, 16, 16, 2), sizes=(3, 3, 1), ignore_index=VOID)
    logits, _ = make_inputs(1, C, 14, 70)
    plan = plan_module.make_plan(config, (1, 14, 70), torch.float32, False)
    inputs = launch_module.Inputs(logits.detach(), regions("corner"), None, None, flat_parameters(proxy))
    looked_up, computed = forward(plan, inputs, True), forward(plan, inputs, False)
    first, second = looked_up["classes"].reshape(2, 4, 3)
    assert first[1:3, 1].tolist() == [2, 2]
    assert second[1:3, 1].tolist() == [-1, 2]
    assert (first >= 0).sum() == 2
    torch.testing.assert_close(looked_up["terms"], computed["terms"], rtol=1e-6, atol=0)
    assert torch.equal(looked_up["counts"], computed["counts"])
    different = looked_up["codes"] ^ computed["codes"]
    # A sum in another order may move t(p) over zero: none of 94080 bits is to be expected, 3 are rounding.
    assert sum(int(((different >> bit) & 1).sum()) for bit in range(8)) <= 3


def make_config(**options: Any) -> FusedConfig:
    """The default loss on a proxy of these channels and sizes."""
    layers = len(options["channels"]) - 1
    defaults: dict[str, Any] = {
        "sizes": (3,) * layers, "layer_weights": (1.0,) * layers, "layer_scales": (1.0,) * layers,
        "tap": "pre", "distance": "l1", "ignore_index": -100, "label_smoothing": 0.0, "mode": "multiclass",
        "reduction": "mean",
    }  # fmt: skip
    return FusedConfig(**{**defaults, **options})


def random_config(source: random.Random) -> FusedConfig:
    """Any loss that the kernels take."""
    layers = source.randint(1, plan_module.MAX_LAYERS)
    return make_config(
        channels=(source.randint(2, 256), *(source.randint(1, 64) for _ in range(layers))),
        sizes=tuple(source.choice((1, 3, 5, 7)) for _ in range(layers)),
        layer_weights=tuple(source.uniform(0, 2) for _ in range(layers)),
        tap=source.choice(("pre", "post")),
        distance=source.choice(launch_module.DISTANCES),
        reduction=source.choice(("mean", "none")),
    )


def test_the_operator_keeps_what_the_plan_lays_out() -> None:
    """`triton_ops.saved` must do without Triton, so it counts again what kernels/plan.py counts."""
    source = random.Random(0)
    for _ in range(300):
        config = random_config(source)
        shape = source.randint(1, 3), source.randint(1, 40), source.randint(1, 40)
        dtype = source.choice((torch.float32, half, brain))
        logits = torch.empty((shape[0], config.channels[0], *shape[1:]), dtype=dtype, device="meta")
        plan = plan_module.make_plan(config, shape, dtype, False)
        kept = triton_ops.saved(logits, logits[:, 0], config)
        assert kept.codes == (plan.code_offsets[-1],)
        assert kept.saved_d == (plan.saved_offsets[-1],)
        assert kept.dtype == plan.dtype
        codes, saved = torch.empty(kept.codes, dtype=torch.uint8), torch.empty(kept.saved_d, dtype=kept.dtype)
        views = launch_module.code_views(plan, codes, saved)
        ends = {"codes": codes.data_ptr(), "saved": saved.data_ptr()}
        for layer, pair in zip(plan.layers, views, strict=True):
            for what, view in zip(ends, pair, strict=True):
                if view is None:
                    continue
                assert view.data_ptr() % 16 == 0, "an access of 16 bytes would be misaligned"
                assert view.data_ptr() >= ends[what], "layers overlap"
                ends[what] = view.data_ptr() + view.nbytes
            if pair[0] is not None:
                assert pair[0].numel() == layer.planes * layer.words * plan.pixels
                assert 8 * pair[0].itemsize * layer.words >= layer.k, "a word has no room for all channels"
            assert (pair[1] is None) == (config.distance == "l1")
        assert ends["codes"] <= codes.data_ptr() + codes.nbytes
        assert ends["saved"] <= saved.data_ptr() + saved.nbytes


def test_the_default_proxy_keeps_24_bytes_a_pixel_at_most() -> None:
    shape = EdgeProxy(21)
    channels = (21, *(layer.out_channels for layer in shape.layers))
    for tap in ("pre", "post"):
        for dtype in (torch.float32, half, brain):
            logits = torch.empty((2, 21, 65, 129), dtype=dtype, device="meta")
            kept = triton_ops.saved(logits, logits[:, 0], make_config(channels=channels, tap=tap))
            assert 0 < kept.codes[0] <= 24 * 2 * 65 * 129
            assert kept.saved_d == (0,)


def test_images_of_a_batch_do_not_see_each_other(real_tile: None) -> None:
    """Rows of tiles end at an image, not at a power of 2; with the default proxy."""
    logits, target = make_inputs(3, C, 3, 7, dtype=torch.float32)
    assert_within_budget(logits.detach(), target, make_proxy(), "triton", ignore_index=VOID)
