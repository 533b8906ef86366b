"""SemedaLoss as a module: nothing to train, nothing to save, nothing to cast; wrappers leave it alone."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss


def criterion_of(case: Case, **options: object) -> SemedaLoss:
    weight = torch.rand(NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    options = {"ignore_index": VOID, "weight": weight, "backend": case.backend, **options}
    return SemedaLoss(make_proxy(), **options).to(case.device)  # type: ignore[arg-type]


@pytest.mark.parametrize(("distance", "value"), [(None, 0.1), ("l1", 0.1), ("smooth_l1", 0.05), ("l2", 0.03)])
def test_the_default_weight_of_the_term_is_that_of_its_distance(distance: str | None, value: float) -> None:
    proxy = make_proxy()
    criterion = SemedaLoss(proxy, distance=distance)
    assert criterion.lambda_semeda == value
    logits, target = torch.randn(1, proxy.num_classes, 9, 9), torch.randint(0, proxy.num_classes, (1, 9, 9))
    expected = SemedaLoss(proxy, distance=distance, lambda_semeda=value)(logits, target)
    assert torch.equal(criterion(logits, target), expected)
    assert torch.equal(semeda_loss(logits, target, proxy, distance=distance), expected)
    of_the_proxy = make_proxy(distance="l2")
    assert SemedaLoss(of_the_proxy).lambda_semeda == 0.03
    with pytest.raises(ValueError, match="distance"):
        SemedaLoss(proxy, distance="l3")


def test_no_parameters_and_an_empty_state_dict(case: Case) -> None:
    criterion = criterion_of(case, lambda_semeda=torch.tensor(0.3))
    assert list(criterion.parameters()) == []
    assert dict(criterion.state_dict()) == {}
    criterion.load_state_dict({})
    model = torch.nn.ModuleDict({"network": torch.nn.Conv2d(3, NUM_CLASSES, 1), "criterion": criterion})
    assert set(model.state_dict()) == {"network.weight", "network.bias"}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.requires_grad_(False),
        lambda m: m.zero_grad() or m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu", torch.float64) if next(m.buffers()).device.type == "cpu" else m.to(torch.float64),
    ],
)
def test_survives(case: Case, change: object) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = criterion_of(case)
    expected = criterion(logits, target)
    changed = change(criterion)  # type: ignore[operator]
    assert {b.dtype for b in changed.buffers()} == {torch.float32}
    assert torch.equal(changed(logits, target), expected)


def test_a_model_that_owns_the_loss_can_be_cast() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Conv2d(3, NUM_CLASSES, 1)
            self.criterion = SemedaLoss(make_proxy())

    model = Model().bfloat16()
    assert model.network.weight.dtype == torch.bfloat16
    assert {b.dtype for b in model.criterion.buffers()} == {torch.float32}


def test_functional_twin(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = criterion_of(case, lambda_semeda=0.7, distance="l2", reduction="sum")
    twin = semeda_loss(
        logits,
        target,
        criterion.proxy,
        ignore_index=VOID,
        weight=criterion.weight,
        lambda_semeda=0.7,
        distance="l2",
        reduction="sum",
        backend=case.backend,
    )
    assert torch.equal(twin, criterion(logits, target))


def test_proxy_as_path_object_or_omitted(tmp_path: Path, case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    proxy = make_proxy()
    file = tmp_path / "proxy.safetensors"
    proxy.save(file)
    options = {"ignore_index": VOID, "backend": case.backend}
    results = [
        SemedaLoss(source, **options).to(case.device)(logits, target)  # type: ignore[arg-type]
        for source in (proxy, file, str(file))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    bundled = SemedaLoss(num_classes=NUM_CLASSES, **options).to(case.device)  # type: ignore[arg-type]
    assert bundled.proxy.num_classes == NUM_CLASSES
    assert torch.isfinite(bundled(logits, target))
    assert SemedaLoss(mode="binary").proxy.num_classes == 2


def test_defaults_come_from_the_proxy() -> None:
    proxy = make_proxy(distance="l2", layer_weights=(1, 2, 3), tap="post")
    criterion = SemedaLoss(proxy)
    assert criterion.distance == "l2"
    assert criterion.layer_weights == (1.0, 2.0, 3.0)
    assert criterion.proxy.tap == "post"
    assert SemedaLoss(proxy, distance="l1", layer_weights=(0, 0, 1)).layer_weights == (0.0, 0.0, 1.0)


def test_lambda_can_be_assigned(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = criterion_of(case, lambda_semeda=0.5)
    parts = criterion(logits, target, return_components=True)
    for value in (
        0.0,
        2,
        torch.tensor(0.25, device=case.device),
        torch.tensor([3.0], dtype=torch.float64),
        1.5,
    ):
        moved = value.to(case.device) if isinstance(value, torch.Tensor) else value
        criterion.lambda_semeda = moved
        assert criterion.lambda_semeda is moved or criterion.lambda_semeda == value
        loss = criterion(logits, target)
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.detach(), parts.ce + float(value) * parts.semeda)
    with pytest.raises(ValueError, match="lambda_semeda must be finite and not negative"):
        criterion.lambda_semeda = -1.0


@pytest.fixture
def process_group(tmp_path: Path) -> object:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


class Both(torch.nn.Module):
    """A network that computes its own loss, as many training scripts do."""

    def __init__(self, criterion: SemedaLoss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Conv2d(3, NUM_CLASSES, 1)
        self.criterion = criterion

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.network(image), target)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_distributed_wrappers(process_group: object, wrapper: str) -> None:
    case = Case("reference", "cpu")
    image = torch.randn(2, 3, 13, 17)
    _, target = make_inputs()
    plain = Both(criterion_of(case))
    expected = plain(image, target)
    expected.backward()
    model = Both(criterion_of(case))
    if wrapper == "ddp":
        wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model)
        network = model.network
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy())
        network = wrapped.network  # type: ignore[assignment]
    loss = wrapped(image, target)
    loss.backward()
    assert torch.equal(loss.detach(), expected.detach())
    grad = network.weight.grad
    assert grad is not None
    assert plain.network.weight.grad is not None
    full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    torch.testing.assert_close(full, plain.network.weight.grad)
    assert {b.dtype for b in model.criterion.buffers()} == {torch.float32}
    assert not any("criterion" in key for key in wrapped.state_dict())


def test_nothing_is_fetched_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Construction and a step work without a network and leave no file behind."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the loss opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    SemedaLoss(num_classes=NUM_CLASSES, ignore_index=VOID)(*make_inputs()).backward()
    assert os.listdir(tmp_path) == []


def test_repr_names_the_configuration() -> None:
    text = repr(SemedaLoss(make_proxy(), lambda_semeda=0.25, ignore_index=VOID))
    assert "lambda_semeda=0.25" in text
    assert "5 -> 16 -> 32 -> 2" in text
    assert isinstance(SemedaLoss(make_proxy()).proxy, EdgeProxy)
