"""pytorch-lightning: the module of the guide trains as a plain loop does; checkpoints, sanity check, metrics, bf16."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semeda_fast import SemedaLoss
from semeda_fast.metrics import BoundaryF

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own deprecations
    pl = pytest.importorskip("pytorch_lightning", reason="pip install 'semeda-fast[lightning]' brings it")

CLASSES, SIZE, VOID = 4, 24, 255
pytestmark = pytest.mark.filterwarnings("ignore")  # few workers, no logger


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    found = []
    for share in (0.0, 0.5, 0.9):
        labels = torch.randint(0, CLASSES, (2, SIZE, SIZE), generator=made)
        labels[torch.rand(labels.shape, generator=made) < share] = VOID
        found.append((torch.randn(2, 3, SIZE, SIZE, generator=made), labels))
    return found


class Segmenter(pl.LightningModule):
    def __init__(self, weight: list[float] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, CLASSES, 3, padding=1)
        self.criterion = SemedaLoss(num_classes=CLASSES, ignore_index=VOID, weight=weight, lambda_semeda=1.0)
        self.boundary_f = BoundaryF(num_classes=CLASSES, ignore_index=VOID, tolerance=1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, target = batch
        loss = self.criterion(self.network(images), target)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, target = batch
        self.boundary_f.update(self.network(images).argmax(1), target)
        self.log("boundary_f", self.boundary_f)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fitted(folder: Path, module: Any, *, epochs: int = 1, resume: Path | None = None, **options: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, max_epochs=epochs,
        enable_model_summary=False, num_sanity_val_steps=1, **options,
    )  # fmt: skip
    load = torch.utils.data.DataLoader
    trainer.fit(module, load(batches(1), batch_size=None), load(batches(2), batch_size=None), ckpt_path=resume)
    return trainer


def test_it_trains_as_a_plain_loop_and_logs_the_metric_of_one_epoch(tmp_path: Path) -> None:
    """The sanity check has seen the first batch of validation before; the epoch's metric does not know of it."""
    trainer = fitted(tmp_path, module := Segmenter([0.5, 1.0, 2.0, 3.0]))
    plain = Segmenter([0.5, 1.0, 2.0, 3.0])
    optimizer = torch.optim.SGD(plain.network.parameters(), 0.05)
    for images, target in batches(1):
        plain.criterion(plain.network(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(module.network.state_dict(), plain.network.state_dict(), rtol=0, atol=0)
    alone = BoundaryF(num_classes=CLASSES, ignore_index=VOID, tolerance=1)
    for images, target in batches(2):
        alone.update(plain.network(images).argmax(1), target)
    assert float(trainer.callback_metrics["boundary_f"]) == pytest.approx(float(alone.compute()), abs=1e-7)


def test_a_checkpoint_holds_the_network_alone_and_loads_again(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, module := Segmenter([0.5, 1.0, 2.0, 3.0]))
    (path,) = tmp_path.rglob("*.ckpt")
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"network.weight", "network.bias"}
    again = Segmenter.load_from_checkpoint(path)
    images, target = batches(3)[1]
    expected = module.criterion(module.network(images), target)
    assert torch.equal(again.criterion(again.network(images), target), expected)
    assert trainer.optimizers[0].param_groups[0]["params"] == list(module.network.parameters())
    fitted(tmp_path, resumed := Segmenter([0.5, 1.0, 2.0, 3.0]), epochs=2, resume=path)
    fitted(tmp_path, without := Segmenter([0.5, 1.0, 2.0, 3.0]), epochs=2)
    assert torch.equal(resumed.network.weight, without.network.weight)
    assert not torch.equal(resumed.network.weight, module.network.weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bf16_the_criterion_stays_in_float32(precision: str, tmp_path: Path) -> None:
    module = Segmenter([0.5, 1.0, 2.0, 3.0])
    trainer = fitted(tmp_path, module, precision=precision)
    assert {buffer.dtype for buffer in module.criterion.buffers()} == {torch.float32}
    exact = Segmenter([0.5, 1.0, 2.0, 3.0])
    fitted(tmp_path / "exact", exact)
    loss = trainer.callback_metrics["loss"]
    images, target = batches(1)[-1]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact.criterion(exact.network(images), target)), rel=0.1)
    assert 0 < float(trainer.callback_metrics["boundary_f"]) < 1
