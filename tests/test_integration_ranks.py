"""DDP and Accelerate over two processes: `counts.all_reduce()` gives the gradient of the whole batch to 1e-6."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semeda_fast import MultiScaleLoss, SemedaLoss

CLASSES, SIZE, RANKS, VOID = 5, 24, 2, 255
SHARES = {
    "0 and 95 %": (0.0, 0.0, 0.95, 0.95),
    "0, 30, 95, 30 %": (0.0, 0.3, 0.95, 0.3),
    "all of one": (0.0, 0.3, 1.0, 1.0),
}
MODES = ("multiclass", "multilabel", "volume", "outputs")


class Network(nn.Module):
    """One convolution; its weights' gradient is summed in float64, so what deviates is the loss."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        layer = nn.Conv3d(1, CLASSES, 3, padding=1) if mode == "volume" else nn.Conv2d(3, CLASSES, 3, padding=1)
        self.layer = layer.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).float()


def criterion_of(mode: str) -> SemedaLoss | MultiScaleLoss:
    weight = torch.linspace(0.2, 3.0, CLASSES)
    options = {"num_classes": CLASSES, "ignore_index": VOID, "weight": weight, "lambda_semeda": 1.0}
    if mode == "multilabel":
        return SemedaLoss(mode=mode, pos_weight=weight.flip(0), **options)
    loss = SemedaLoss(**options)
    return MultiScaleLoss(loss, [1.0, 0.5]) if mode == "outputs" else loss


def batch(mode: str, shares: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(4)
    size = (4, 6, SIZE, SIZE) if mode == "volume" else (4, SIZE, SIZE)
    images = torch.randn((4, 1 if mode == "volume" else 3, *size[1:]), generator=made, dtype=torch.float64)
    planes = (4, CLASSES, SIZE, SIZE) if mode == "multilabel" else size
    labels = torch.randint(0, 2 if mode == "multilabel" else CLASSES, planes, generator=made)
    for each, share in zip(labels, shares, strict=True):
        each[torch.rand(each.shape, generator=made) < share] = VOID
    return images, labels


def loss_of(criterion: SemedaLoss | MultiScaleLoss, logits: Tensor, labels: Tensor, counts: object = None) -> Tensor:
    several = isinstance(criterion, MultiScaleLoss)
    return criterion([logits, logits[..., ::2, ::2]] if several else logits, labels, counts=counts)


def counts_of(criterion: SemedaLoss | MultiScaleLoss, labels: Tensor) -> object:
    return (criterion.criterion if isinstance(criterion, MultiScaleLoss) else criterion).counts(labels)


def gradient(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def expected(mode: str, shares: tuple[float, ...]) -> list[Tensor]:
    model, criterion = Network(mode), criterion_of(mode)
    images, labels = batch(mode, shares)
    loss_of(criterion, model(images), labels).backward()
    return gradient(model)


def with_ddp(rank: int, mode: str, shares: tuple[float, ...]) -> list[Tensor]:
    model, criterion = DistributedDataParallel(Network(mode)), criterion_of(mode)
    images, labels = (each[2 * rank : 2 * rank + 2] for each in batch(mode, shares))
    counts = counts_of(criterion, labels).all_reduce()
    loss_of(criterion, model(images), labels, counts).backward()
    return gradient(model)


def with_ddp_and_accumulation(rank: int, mode: str, shares: tuple[float, ...]) -> list[Tensor]:
    model, criterion = DistributedDataParallel(Network(mode)), criterion_of(mode)
    images, labels = (each[2 * rank : 2 * rank + 2].split(1) for each in batch(mode, shares))
    counts = sum(counts_of(criterion, each) for each in labels).all_reduce()
    with model.no_sync():
        loss_of(criterion, model(images[0]), labels[0], counts).backward()
    loss_of(criterion, model(images[1]), labels[1], counts).backward()
    return gradient(model)


def with_accelerate(rank: int, mode: str, shares: tuple[float, ...]) -> list[Tensor]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == RANKS
    model, criterion = accelerator.prepare(Network(mode)), criterion_of(mode)
    images, labels = (each[2 * rank : 2 * rank + 2].split(1) for each in batch(mode, shares))
    counts = sum(counts_of(criterion, each) for each in labels).all_reduce()
    for image, target in zip(images, labels, strict=True):
        with accelerator.accumulate(model):
            loss = loss_of(criterion, model(image), target, counts)
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)  # which backward divides by
    return gradient(model)


def with_fsdp(rank: int, mode: str, shares: tuple[float, ...]) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, criterion = Network(mode), criterion_of(mode)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    images, labels = (each[2 * rank : 2 * rank + 2] for each in batch(mode, shares))
    counts = counts_of(criterion, labels).all_reduce()
    loss_of(criterion, model(images), labels, counts).backward()
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


WAYS: dict[str, Callable[[int, str, tuple[float, ...]], list[Tensor]]] = {
    "ddp": with_ddp, "ddp, accumulation": with_ddp_and_accumulation, "accelerate": with_accelerate, "fsdp2": with_fsdp,
}  # fmt: skip


def process(rank: int, folder: str) -> None:
    """All cases in one process a rank: starting one takes seconds."""
    torch.set_num_threads(1)
    # What a launcher says; Accelerate reads it, and takes the group that is there.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {(way, mode, s): WAYS[way](rank, mode, SHARES[s]) for way in WAYS for mode in MODES for s in SHARES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str, str], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_one_process_with_the_whole_batch(
    found: list[dict[tuple[str, str, str], list[Tensor]]], way: str, mode: str, shares: str
) -> None:
    whole = expected(mode, SHARES[shares])
    largest = max(float(each.abs().max()) for each in whole)
    for of_rank in found:
        for part, of_whole in zip(of_rank[way, mode, shares], whole, strict=True):
            assert float((part - of_whole).abs().max()) <= 1e-6 * largest
