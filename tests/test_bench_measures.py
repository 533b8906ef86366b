"""What the benchmarks count: labels, work, memory, intervals, the order of rounds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import labels, memory, timing
from benchmarks.contenders import contenders
from benchmarks.timing import Budget
from benchmarks.work import work_of
from benchmarks.workloads import HEADLINE, LAMBDA_CE, make_inputs, make_proxy, named, with_classes


def test_edge_share_of_a_map_that_can_be_counted_by_hand() -> None:
    target = torch.zeros(1, 6, 8, dtype=torch.int64)
    target[:, :, 4:] = 3  # columns 3 and 4 see both
    assert labels.mixed_share(target, 3) == pytest.approx(2 / 8)
    assert labels.mixed_share(target, 5) == pytest.approx(4 / 8)
    target[0, 0, 0] = 255  # void is a label of its own: 4 pixels see it
    assert labels.mixed_share(target, 3) == pytest.approx((2 * 6 + 4) / 48)


@pytest.mark.parametrize("kind", ["scenes", "random"])
@pytest.mark.parametrize("num_classes", [2, 21, 256])
def test_labels_are_valid_deterministic_and_described(kind: str, num_classes: int) -> None:
    void = 255 if num_classes <= 255 else -100
    first, facts = labels.make_labels(kind, num_classes, (2, 70, 600), void, 7)
    second, _ = labels.make_labels(kind, num_classes, (2, 70, 600), void, 7)
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.shape == (2, 70, 600)
    classes = first[first != void]
    assert int(classes.min()) >= 0
    assert int(classes.max()) < num_classes
    assert facts.source == kind
    assert facts.void_share == pytest.approx(float((first == void).double().mean()))
    if kind == "random":
        assert facts.edge_share > (0.99 if num_classes > 2 else 0.9)
    assert facts.mixed_share >= facts.edge_share


def test_camvid_is_spread_over_the_classes_and_missing_camvid_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mask = torch.arange(12, dtype=torch.uint8)
    spread = labels.spread_classes(mask, 21, 255).tolist()
    assert spread == [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 255]
    assert labels.spread_classes(mask, 11, 255).tolist() == [*range(11), 255]
    assert labels.spread_classes(mask, 2, 255).tolist() == [0, 1] * 5 + [0, 255]
    monkeypatch.setenv(labels.CAMVID_VARIABLE, str(tmp_path))
    _, facts = labels.make_labels("camvid", 21, (1, 32, 32), 255, 7)
    assert facts.source == "scenes"
    assert "not found" in facts.note


def test_camvid_where_it_is_present() -> None:
    if labels.camvid_masks() is None:
        pytest.skip("no CamVid masks in ../shared/data/camvid")
    target, facts = labels.make_labels("camvid", 21, (2, 512, 512), 255, 7)
    assert facts.source == "camvid"
    assert 0.02 < facts.edge_share < 0.15
    wide, wide_facts = labels.make_labels("camvid", 21, (1, 1024, 1024), 255, 7)
    assert wide.shape == (1, 1024, 1024)
    assert wide_facts.edge_share == pytest.approx(facts.edge_share, abs=0.04)  # a mosaic keeps the density
    one, one_facts = labels.make_labels("camvid", 21, (1, 512, 512), 255, 7)
    for side in (64, 128, 256):  # and so does a small map: time against pixels must not show the labels
        _, small_facts = labels.make_labels("camvid", 21, (1, side, side), 255, 7)
        assert small_facts.edge_share == pytest.approx(one_facts.edge_share, abs=0.01)
    assert one.shape == (1, 512, 512)
    assert set(target.unique().tolist()) <= {0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 255}


@pytest.mark.parametrize("num_classes", [1, 2, 21, 256])
def test_logits_are_neither_uniform_nor_saturated(num_classes: int) -> None:
    inputs = make_inputs(with_classes(num_classes, batch=1, height=64, width=64, labels="scenes"))
    z = inputs.logits
    z = torch.cat([torch.zeros_like(z), z], dim=1) if num_classes == 1 else z
    top = z.softmax(1).amax(1)
    assert 0.3 < float(top.mean()) < 0.9


def test_names_are_unique_and_the_proxies_have_their_widths() -> None:
    names = {named(d, proxy=p).name for d in ("voc", "binary") for p in ("default", "wide", "deep")}
    assert len(names) == 6
    assert make_proxy(named("voc", proxy="wide")).widths == (32, 64)
    assert make_proxy(named("voc", proxy="deep")).widths == (16, 32, 32, 32, 32, 32)
    assert with_classes(1).mode == "binary"
    with pytest.raises(ValueError, match="workload must be one of voc, "):
        named("imagenet")
    with pytest.raises(ValueError, match="proxy must be one of"):
        named("voc", proxy="tiny")


def test_work_is_counted_from_the_geometry() -> None:
    """Default proxy, C=21: 2*9*(21*16 + 16*32 + 32*2) FLOP a pass, checked against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    work = work_of(HEADLINE)
    assert work.pass_flops == 18 * (21 * 16 + 16 * 32 + 32 * 2)
    assert work.flops == 3 * work.pass_flops
    assert work.bytes == 21 * 4 * 2 + 8
    assert work_of(HEADLINE.replace(dtype="bfloat16"), "nograd").bytes == 21 * 2 + 8
    inputs = make_inputs(HEADLINE.replace(batch=1, height=64, width=64, labels="random"))
    leaf = inputs.leaf("nchw")
    function = contenders()["reference"].make(inputs, "inductor")
    with FlopCounterMode(display=False) as counter:
        function(leaf, inputs.target).backward()
    assert counter.get_total_flops() == work.flops * 64 * 64


@torch.library.custom_op("semeda_bench_test::keeps", mutates_args=())
def _keeps(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(), torch.zeros(1000, dtype=torch.uint8)


def _setup(ctx: object, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])  # type: ignore[attr-defined]


def _backward(ctx: object, d_sum: Tensor, _: Tensor) -> Tensor:
    x, _codes = ctx.saved_tensors  # type: ignore[attr-defined]
    return d_sum.expand_as(x)


_keeps.register_autograd(_backward, setup_context=_setup)


def test_saved_bytes_sees_custom_operators_and_counts_each_storage_once() -> None:
    inputs = make_inputs(named("voc", batch=1, height=8, width=8, labels="random"))
    leaf = inputs.leaf("nchw")
    # The operator keeps 1000 bytes of its own and the logits, which do not count.
    assert memory.saved_bytes(lambda z, y: _keeps(z)[0], leaf, inputs) == 1000

    def squares(z: Tensor, y: Tensor) -> Tensor:
        t = z.exp()  # saved by exp and by both factors of the product
        return (t * t).sum()

    assert memory.saved_bytes(squares, leaf, inputs) == 21 * 64 * 4
    ce = contenders()["ce"].make(inputs, "inductor")
    per_pixel = memory.saved_bytes(ce, leaf, inputs) / 64
    assert 84 <= per_pixel < 85  # log-probabilities; the labels are given


def test_peak_memory_holds_the_gradient_and_the_activations() -> None:
    if memory.why_no_peak():
        pytest.skip(memory.why_no_peak())
    inputs = make_inputs(named("voc", batch=1, height=256, width=256, labels="random"))
    found = contenders()
    reference = memory.measure_peak(found["reference"], inputs, "inductor")
    ce = memory.measure_peak(found["ce"], inputs, "inductor")
    assert reference.above_inputs is not None
    assert ce.above_inputs is not None
    assert ce.between is not None
    gradient = 21 * 4 * 256 * 256
    assert reference.gradient == gradient
    slack = 2 * 2**20
    assert ce.between >= gradient - slack  # cross-entropy keeps the log-probabilities, as large as the gradient
    assert 2 * gradient - slack <= ce.above_inputs < 4 * gradient
    assert reference.above_inputs > 5 * gradient
    assert reference.above_inputs > 3 * ce.above_inputs


def test_interleaving_runs_each_step_once_a_round_in_changing_orders() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleaved(steps, Budget(0.0, 8, 20), warmup=1)
    assert calls[:3] == ["a", "b", "c"]
    rounds = ["".join(calls[3 + 3 * i : 6 + 3 * i]) for i in range(8)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert len(calls) == 3 * 9  # the budget is used up at once, so the fewest rounds are run
    assert all(len(samples[name].seconds) == 8 for name in steps)
    assert len(timing.interleaved(steps, Budget(1e9, 1, 4))["a"].seconds) == 4
    assert timing.interleaved({}, Budget(1.0)) == {}


def test_the_step_leaves_no_gradient_and_honours_its_mode() -> None:
    leaf = torch.ones(1, 2, 3, 3, requires_grad=True)
    seen: list[tuple[bool, bool]] = []

    def function(z: Tensor, y: Tensor) -> Tensor:
        loss = (z * z).sum()
        seen.append((torch.is_grad_enabled(), loss.requires_grad))
        return loss

    for mode in timing.MODES:
        timing.make_step(function, leaf, torch.zeros(1, 3, 3), mode)()
        assert leaf.grad is None
    assert seen == [(False, False), (True, True), (True, True)]
    with pytest.raises(ValueError, match="mode must be one of nograd, forward, fwdbwd"):
        timing.make_step(function, leaf, torch.zeros(1, 3, 3), "train")


def test_paired_intervals_cancel_a_common_drift_and_unpaired_do_not() -> None:
    rng = np.random.default_rng(0)
    drift = 1 + rng.random(40)
    slow = 2 * drift * (1 + 0.01 * rng.standard_normal(40))
    paired = timing.paired_ratio(slow.tolist(), drift.tolist())
    assert paired.low < 2 < paired.high
    assert paired.high - paired.low < 0.1
    unpaired = timing.unpaired_ratio(slow.tolist(), drift.tolist())
    assert unpaired.low < 2 < unpaired.high
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="the same rounds"):
        timing.paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="both runs"):
        timing.unpaired_ratio([], [1.0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        a, b = 3 * rng.lognormal(0, 0.1, 25), rng.lognormal(0, 0.1, 25)
        ratio = timing.paired_ratio(a.tolist(), b.tolist(), resamples=400, seed=seed)
        hits += ratio.low <= 3 <= ratio.high
    assert 0.88 <= hits / 200 <= 0.995


def test_lambdas_of_the_workloads_let_both_terms_count() -> None:
    assert LAMBDA_CE == 1.0
    inputs = make_inputs(named("voc", batch=1, height=32, width=32, labels="scenes"))
    loss = contenders()["reference"].make(inputs, "inductor")(inputs.logits, inputs.target)
    ce = contenders()["ce"].make(inputs, "inductor")(inputs.logits, inputs.target)
    assert float(loss - ce) > 0.5 * float(ce)
