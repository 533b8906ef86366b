"""Whole training steps in the benchmark suite: what is timed, what is checked, and how the overhead is computed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from semeda_fast.backends import reference
from semeda_fast.backends import registry as backends

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import networks, oracle
from benchmarks.contenders import contenders, upsampling
from benchmarks.report import report, tables
from benchmarks.suite import plans, steps, worker
from benchmarks.suite.plans import Plan
from benchmarks.suite.runner import Run
from benchmarks.timing import Budget
from benchmarks.workloads import make_inputs, named

WORKLOAD = named("camvid", labels="random", batch=2, height=32, width=32)


def training() -> steps.Training:
    return steps.Training.of("upernet_resnet50", WORKLOAD, "cpu", tiny=True)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target, ignore_index=255)


def test_a_step_is_forward_loss_backward_and_optimizer() -> None:
    one, other = training(), training()
    one.step_of(cross_entropy)()
    assert len(one.parts) == 1
    assert one.parts[0] > 0
    for network in (one.network, other.network):
        assert network.training
    optimizer = torch.optim.AdamW(other.network.parameters(), lr=steps.LEARNING_RATE)
    cross_entropy(other.network(other.images), other.inputs.target).backward()
    optimizer.step()
    pairs = list(zip(one.network.parameters(), other.network.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(a.grad is None for a, _ in pairs)
    fresh = list(training().network.parameters())
    assert sum(not torch.equal(a, b) for (a, _), b in zip(pairs, fresh, strict=True)) > len(fresh) // 2


def test_the_checked_logits_have_the_networks_layout_and_the_labels_mark() -> None:
    made = steps.Training.of("segformer_b0", WORKLOAD, "cpu", tiny=True)
    with torch.no_grad():
        assert made.inputs.logits.stride() == made.forward().stride()
    assert made.leaf().stride() == made.inputs.logits.stride()
    assert made.inputs.logits.softmax(dim=1).amax(dim=1).mean() > 0.3  # of 11 classes: nothing uniform
    assert made.parameters == sum(p.numel() for p in made.network.parameters())


@pytest.mark.parametrize("name", networks.CPU_NETWORKS)
def test_every_network_gives_logits_of_the_images_size_and_learns(name: str) -> None:
    network = networks.build(name, 5, (64, 64), tiny=True)
    images = torch.randn(2, 3, 64, 64)
    logits = network(images)
    assert logits.shape == (2, 5, 64, 64)
    assert (network.small(images).shape == logits.shape) == networks.NETWORKS[name].full_size
    logits.square().sum().backward()
    assert sum(p.grad is not None for p in network.parameters()) > 10
    again = networks.build(name, 5, (64, 64), tiny=True)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_networks_that_cannot_be_built_are_named() -> None:
    with pytest.raises(ValueError, match=r"network must be one of mobilenet_v2, .*, got 'vgg'"):
        networks.build("vgg", 5, (64, 64))
    with pytest.raises(ValueError, match="square images, got 32x64"):
        networks.build("dpt_small", 5, (32, 64), tiny=True)
    missing = networks.Network("none", "None", "no_such_package", networks.NETWORKS["dpt_small"].make)
    assert "no_such_package" in missing.why_not()


def test_a_wrong_backend_gets_no_time_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        terms = reference.loss_terms(*arguments)
        return terms._replace(semeda=1.01 * terms.semeda)

    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    backends.register(backends.Backend("off_by_one_percent", wrong, ("cpu",)))
    case = plans.step_case("upernet_resnet50", WORKLOAD, 1, Budget(0.0, 3, 3), tiny=True)
    plan = Plan("step", (case,), compiler="aot_eager")
    records = {record["contender"]: record for record in worker.run_plan(plan)}
    assert records["off_by_one_percent"]["status"] == "wrong"
    assert "seconds" not in records["off_by_one_percent"]
    for name in ("ce", "reference", "compiled"):
        assert records[name]["status"] == "ok"
        assert len(records[name]["seconds"]) == len(records[name]["loss_seconds"]) == 3
        assert all(
            part < whole for part, whole in zip(records[name]["loss_seconds"], records[name]["seconds"], strict=True)
        )
    assert not any(name.endswith("_cl") for name in records)
    assert tables.overhead(records["off_by_one_percent"], list(records.values())) is None


def test_small_logits_are_checked_and_timed_as_the_network_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that scales them up itself; one that does so with other corners is found out."""
    assert [c.name for c in upsampling().values()] == ["cpu_upsample"] if "cpu" in backends.names() else []

    def aligned(logits: torch.Tensor, target: torch.Tensor, *others: Any) -> Any:
        size = target.shape[1:]
        large = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        return reference.loss_terms(large, target, *others)

    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    for name, run in (("right", reference.loss_terms), ("aligned", aligned)):
        backends.register(backends.Backend(name, run, ("cpu",), upsamples=lambda logits, target: True))
    case = plans.step_case("segformer_b0", WORKLOAD, 1, Budget(0.0, 3, 3), tiny=True)
    plan = Plan("step", (case,), compiler="aot_eager")
    records = {record["contender"]: record for record in worker.run_plan(plan)}
    wrong = records.pop("aligned_upsample")
    records.pop("aligned")  # of a size with the labels it has nothing to scale
    assert wrong["status"] == "wrong"
    assert {"right_upsample", "ce"} <= set(records)
    assert {record["status"] for record in records.values()} == {"ok"}
    assert len(records["right_upsample"]["loss_seconds"]) == 3
    case = plans.step_case("upernet_resnet50", WORKLOAD, 1, Budget(0.0, 1, 1), tiny=True)
    whole = worker.run_plan(Plan("step", (case,), compiler="aot_eager"))
    assert not any(record["contender"].endswith("_upsample") for record in whole)


def test_a_workload_of_another_distance_is_checked_with_it() -> None:
    squares = WORKLOAD.replace(distance="l2")
    assert squares.name == "camvid-default-l2-float32-2x32x32-random"
    inputs, plain = make_inputs(squares), make_inputs(WORKLOAD)
    assert (inputs.proxy.distance, plain.proxy.distance) == ("l2", "l1")
    assert inputs.proxy.layer_scales("l2") == plain.proxy.layer_scales("l2")
    truth, other = oracle.compute_oracle(inputs), oracle.compute_oracle(plain)
    function = contenders()["reference"].make(inputs, "aot_eager")
    assert oracle.check(function, inputs.leaf("nchw"), inputs, truth, "loss").ok
    assert not oracle.check(function, inputs.leaf("nchw"), inputs, other, "loss").ok


def record(contender: str, seconds: list[float], loss: list[float] | None, **more: Any) -> dict[str, Any]:
    return {
        **{"kind": "step", "suite": "steps", "group": "g", "contender": contender, "title": contender.upper()},
        **{"status": "ok", "network": "segformer_b0", "title_network": "SegFormer-B0", "parameters": 3_700_000},
        **{"seconds": seconds, "loss_seconds": loss, "allocator": "tuned", "threads": 2, "mode": "step"},
        **{"workload": vars(WORKLOAD), "workload_name": WORKLOAD.name, **more},
    }


def test_overhead_is_relative_to_the_step_with_cross_entropy() -> None:
    group = [
        record("ce", [1.0, 1.1, 0.9], [0.1, 0.1, 0.1]),
        record("fused", [1.03, 1.13, 0.93], [0.12, 0.13, 0.14]),
        record("broken", [], None, status="wrong", reason="off"),
    ]
    over = tables.overhead(group[1], group)
    assert over is not None
    assert over.value == pytest.approx(0.03)
    assert over.low <= 0.03 <= over.high
    assert tables.loss_part(group[1], group) == pytest.approx(0.03)
    assert tables.overhead(group[0], group) is None
    assert tables.overhead(group[2], group) is None
    peak = {**record("fused", [], None), "kind": "step-memory", "above_inputs": 3 * 2**20}
    _, rows = tables.step_table(group, [peak])
    assert rows[1][2].startswith("+3.0 % [")
    assert rows[1][3:] == ["+3.0 %", "1.94", "3.0"]
    assert rows[2][1] == "WRONG: off"
    assert tables.loss_part(record("fused", [1.0], None), group) is None


def test_the_report_has_a_table_and_a_plot_of_steps(tmp_path: Path) -> None:
    facts = {"source": "random", "edge_share": 1.0, "mixed_share": 1.0, "void_share": 0.0, "note": ""}
    group = [
        record("ce", [1.0, 1.1, 0.9], [0.1] * 3, labels=facts),
        record("fused", [1.03, 1.13, 0.93], [0.12, 0.13, 0.14], labels=facts),
        record("reference", [1.5, 1.6, 1.4], [0.6, 0.6, 0.6], labels=facts),
        record("broken", [], None, status="failed", reason="it fell over", labels=facts),
    ]
    other = {"group": "h", "network": "upernet_resnet50", "title_network": "UPerNet"}  # without one of the contenders
    group += [{**entry, **other} for entry in group if entry["contender"] != "fused"]
    run = Run("steps", "run --steps", {}, records=group)
    text = "\n".join(report.step_parts(run, tmp_path))
    assert "**SegFormer-B0**, 3.7 M weights" in text
    assert "FAILED: it fell over" in text
    assert (tmp_path / "overhead-camvid-tuned.png").stat().st_size > 1000
    assert report.step_parts(Run("steps", "", {}), tmp_path) == []


def test_the_peak_of_a_step_is_that_of_its_loss_and_network() -> None:
    """In this process, so no more than a sanity check: a loss that holds 64 MiB more needs that much more."""

    def greedy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        held = torch.ones(16 * 2**20)
        return cross_entropy(logits, target) * held[0]

    if steps.memory.why_no_peak():
        pytest.skip(steps.memory.why_no_peak())
    made = training()
    for function in (cross_entropy, greedy):
        made.step_of(function)()
    plain, more = (steps.memory.peak_of(made.step_of(function), "cpu") for function in (cross_entropy, greedy))
    assert more - plain > 48 * 2**20


def test_the_sets_hold_the_steps_they_promise() -> None:
    for which in ("steps", "full"):
        made = plans.make_plans(which, device="cpu", threads=4, fused=("cpu", "cpu_cl"))
        found = {(c.network, c.workload.num_classes, p.allocator) for p in made for c in p.cases
                 if c.kind == "step" and c.workload is not None}  # fmt: skip
        for network in networks.CPU_NETWORKS:
            assert {(network, 21, "default"), (network, 21, "tuned"), (network, 19, "tuned")} <= found
        memory = {(c.network, c.contenders) for p in made for c in p.cases if c.kind == "step-memory"}
        assert (networks.CPU_NETWORKS[0], ("cpu",)) in memory
        cuda = plans.make_plans(which, device="cuda", threads=4, fused=("triton",))
        assert [c.network for p in cuda for c in p.cases if c.kind == "step"] == list(networks.GPU_NETWORKS)
