"""`transformers.Trainer` with SegFormer: the gradient and the logged loss of the whole batch, void not counted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semeda_fast import MultiScaleLoss, SemedaLoss

pytest.importorskip("transformers", reason="pip install 'semeda-fast[transformers]' brings it")

from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from semeda_fast.integrations.transformers import compute_loss_func, count_whole_batches

CLASSES, SIZE = 5, 32
VOID_SHARES = (0.0, 0.3, 0.95, 1.0)


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=CLASSES, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    model.decode_head.batch_norm = nn.Identity()  # its statistics are those of a micro-batch
    return model


def images(void: int) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(1)
    data = []
    for share in VOID_SHARES:
        labels = torch.randint(0, CLASSES, (SIZE // 8, SIZE // 8), generator=made).repeat_interleave(8, 0)
        labels = labels.repeat_interleave(8, 1)
        labels[torch.rand(SIZE, SIZE, generator=made) < share] = void
        data.append({"pixel_values": torch.randn(3, SIZE, SIZE, generator=made), "labels": labels})
    return data


class Seen(TrainerCallback):
    """The gradients of each step, and what was logged."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.gradients.append([p.grad.clone() for p in more["model"].parameters()])

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if "loss" in more["logs"]:
            self.losses.append(more["logs"]["loss"])


def trainer_of(
    model: nn.Module, criterion: Any, void: int, folder: Path, *, size: int, steps: int, **more: Any
) -> tuple[Trainer, Seen]:
    seen = Seen()
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=size, max_grad_norm=0.0,
        gradient_accumulation_steps=steps, max_steps=1, logging_steps=1, save_strategy="no", disable_tqdm=True,
        per_device_eval_batch_size=size, **more,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=images(void), eval_dataset=images(void), callbacks=[seen],
        compute_loss_func=compute_loss_func(criterion),
    )  # fmt: skip
    return trainer, seen


def whole_batch(model: nn.Module, criterion: SemedaLoss, void: int) -> tuple[Tensor, list[Tensor]]:
    data = images(void)
    logits = model(pixel_values=torch.stack([each["pixel_values"] for each in data])).logits
    assert logits.shape[-1] == SIZE // 4
    loss = criterion.scaled(logits, torch.stack([each["labels"] for each in data]))
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    largest = max(float(each.abs().max()) for each in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / largest


def criterion_of(void: int, weighted: bool) -> SemedaLoss:
    weight = torch.linspace(0.2, 3.0, CLASSES) if weighted else None
    return SemedaLoss(num_classes=CLASSES, ignore_index=void, weight=weight, lambda_semeda=1.0)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class weights"])
@pytest.mark.parametrize("void", [255, -100])
@pytest.mark.parametrize(("size", "steps"), [(4, 1), (1, 4), (2, 2), (3, 2)], ids=str)
def test_the_gradient_and_the_logged_loss_are_those_of_the_whole_batch(
    size: int, steps: int, void: int, weighted: bool, tmp_path: Path
) -> None:
    model, criterion = segformer(), criterion_of(void, weighted)
    loss, gradients = whole_batch(model, criterion, void)
    trainer, seen = trainer_of(model, criterion, void, tmp_path, size=size, steps=steps)
    count_whole_batches(trainer)
    trainer.train()
    assert deviation(seen.gradients[0], gradients) < 1e-6
    assert seen.losses[0] == pytest.approx(float(loss), rel=1e-4)  # the Trainer rounds to four digits


def test_the_trainers_own_count_is_enough_where_it_is_exact(tmp_path: Path) -> None:
    model, criterion = segformer(), criterion_of(-100, False)
    loss, gradients = whole_batch(model, criterion, -100)
    trainer, seen = trainer_of(model, criterion, -100, tmp_path, size=1, steps=4)
    trainer.train()
    assert deviation(seen.gradients[0], gradients) < 1e-6
    assert seen.losses[0] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(("void", "weighted"), [(255, False), (-100, True)])
def test_where_it_is_not_the_first_step_says_so(void: int, weighted: bool, tmp_path: Path) -> None:
    trainer, _ = trainer_of(segformer(), criterion_of(void, weighted), void, tmp_path, size=2, steps=2)
    with pytest.raises(ValueError, match=r"count_whole_batches\(trainer\)"):
        trainer.train()


@pytest.mark.parametrize("counted", [False, True])
def test_without_accumulation_one_line_is_enough_and_evaluation_means_over_its_own_batch(
    counted: bool, tmp_path: Path
) -> None:
    model, criterion = segformer(), criterion_of(255, True)
    trainer, seen = trainer_of(model, criterion, 255, tmp_path, size=4, steps=1)
    if counted:
        count_whole_batches(trainer)
    loss, gradients = whole_batch(model, criterion, 255)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    trainer.train()
    assert deviation(seen.gradients[0], gradients) < 1e-6
    loss, _ = whole_batch(model, criterion, 255)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_networks_own_loss_is_not_computed(tmp_path: Path) -> None:
    model, outputs, asked = segformer(), [], []

    def see(module: nn.Module, positional: Any, keywords: dict[str, Any], output: Any) -> None:
        asked.append(keywords.get("labels"))
        outputs.append(output)

    model.register_forward_hook(see, with_kwargs=True)
    trainer, _ = trainer_of(model, criterion_of(255, False), 255, tmp_path, size=4, steps=1)
    trainer.train()
    assert asked == [None]
    assert outputs[0].loss is None


def test_bf16_and_several_outputs(tmp_path: Path) -> None:
    model, criterion = segformer(), criterion_of(255, False)
    loss, _ = whole_batch(model, criterion, 255)
    several = MultiScaleLoss(criterion, {"logits": 0.5})
    trainer, seen = trainer_of(model, several, 255, tmp_path, size=2, steps=2, bf16=True)
    count_whole_batches(trainer)
    trainer.train()
    assert seen.losses[0] == pytest.approx(0.5 * float(loss), rel=2e-2)


def test_what_is_no_criterion() -> None:
    with pytest.raises(TypeError, match="must be a SemedaLoss or a MultiScaleLoss, got CrossEntropyLoss"):
        compute_loss_func(nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction='mean', got 'sum'"):
        compute_loss_func(SemedaLoss(num_classes=5, reduction="sum"))


def test_a_batch_without_labels() -> None:
    with pytest.raises(ValueError, match="holds no 'labels'"):
        compute_loss_func(SemedaLoss(num_classes=5))(None, None)  # type: ignore[arg-type]


def test_counting_is_for_trainers_with_this_loss(tmp_path: Path) -> None:
    trainer = Trainer(model=segformer(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match=r"must be compute_loss_func\(criterion\), got NoneType"):
        count_whole_batches(trainer)


@pytest.mark.parametrize("averaged", [True, False])
def test_two_processes(averaged: bool, tmp_path: Path) -> None:
    """Two processes with two micro-batches each, one image in each."""
    model, criterion = segformer(), criterion_of(255, True)
    loss, gradients = whole_batch(model, criterion, 255)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", __file__, str(tmp_path), json.dumps(averaged)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert deviation(found["gradients"], gradients) < 1e-6
    found = torch.load(tmp_path / "0.pt")
    assert found["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(evaluated(copy.deepcopy(model), criterion), rel=1e-4)


def evaluated(model: nn.Module, criterion: SemedaLoss) -> float:
    """The mean over the evaluation's two global batches of two images each, as the Trainer has it."""
    data, losses = images(255), []
    for part in (data[:2], data[2:]):
        with torch.no_grad():
            logits = model(pixel_values=torch.stack([each["pixel_values"] for each in part])).logits
            losses.append(float(criterion.scaled(logits, torch.stack([each["labels"] for each in part]))))
    return sum(losses) / 2


def one_of_two(folder: Path, averaged: bool) -> None:
    trainer, seen = trainer_of(
        segformer(), criterion_of(255, True), 255, folder, size=1, steps=2,
        average_tokens_across_devices=averaged, ddp_backend="gloo", learning_rate=0.0,
    )  # fmt: skip
    count_whole_batches(trainer)
    trainer.train()  # first: a Trainer that has evaluated before does not average its gradients any more
    eval_loss = trainer.evaluate()["eval_loss"]
    found = {"gradients": seen.gradients[0], "loss": (seen.losses or [0.0])[0], "eval_loss": eval_loss}
    torch.save(found, folder / f"{trainer.args.process_index}.pt")


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]), json.loads(sys.argv[2]))
