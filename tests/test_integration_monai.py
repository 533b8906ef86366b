"""MONAI: loss_function of SupervisedTrainer, with MetaTensors, float labels [N,1,...], a 3-D UNet, beside DiceCE."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semeda_fast import MultiScaleLoss, SemedaLoss
from semeda_fast.integrations.monai import MonaiLoss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own deprecations
    pytest.importorskip("monai", reason="`make test-integrations` has it")
    pytest.importorskip("ignite", reason="`make test-integrations` has it")
    from monai.data import MetaTensor
    from monai.engines import SupervisedEvaluator, SupervisedTrainer
    from monai.inferers import SlidingWindowInferer
    from monai.losses import DeepSupervisionLoss, DiceCELoss
    from monai.networks.nets import UNet

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES, SIZE = 3, 16


def unet(spatial: int) -> nn.Module:
    torch.manual_seed(0)
    return UNet(spatial, in_channels=1, out_channels=CLASSES, channels=(8, 16), strides=(2,), norm="instance")


def batch(spatial: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    image = torch.randn((2, 1, *(SIZE,) * spatial), generator=made)
    label = torch.randint(0, CLASSES, image.shape, generator=made).to(dtype)
    return {"image": MetaTensor(image), "label": MetaTensor(label)}


def criterion_of(**options: Any) -> SemedaLoss:
    return SemedaLoss(num_classes=CLASSES, slice_dim=options.pop("slice_dim", 2), lambda_semeda=1.0, **options)


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64], ids=str)
def test_supervised_trainer_takes_the_step_of_a_plain_loop(spatial: int, dtype: torch.dtype) -> None:
    slices = {"slice_dim": 4} if spatial == 3 else {}
    losses: list[Tensor] = []
    network, data = unet(spatial), [batch(spatial, seed, dtype) for seed in range(2)]
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=data, network=network, amp=False,
        optimizer=torch.optim.SGD(network.parameters(), 0.1), loss_function=MonaiLoss(criterion_of(**slices)),
    )  # fmt: skip
    from ignite.engine import Events

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
    trainer.run()

    plain, criterion = unet(spatial), criterion_of(**slices)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for item, found in zip(data, losses, strict=True):
        labels = item["label"].as_tensor()[:, 0].long()
        loss = criterion(plain(item["image"].as_tensor()), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(torch.as_tensor(found), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dict(network.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)


def test_beside_dice_ce_both_are_added() -> None:
    data, network = batch(3), unet(3)
    criterion = criterion_of(lambda_ce=0.0, slice_dim=4)
    dice = DiceCELoss(to_onehot_y=True, softmax=True)
    logits = network(data["image"])
    assert isinstance(logits, MetaTensor)
    both = MonaiLoss(criterion, beside=dice)(logits, data["label"])
    term = criterion(logits.as_tensor(), data["label"].as_tensor()[:, 0].long())
    assert type(both) is Tensor
    torch.testing.assert_close(both, term + dice(logits, data["label"]).as_tensor())
    both.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_monais_deep_supervision(dtype: torch.dtype) -> None:
    """MONAI scales the labels down to each level; MultiScaleLoss scales the logits up instead."""
    made = torch.Generator().manual_seed(2)
    label = batch(2, dtype=dtype)["label"]
    levels = [torch.randn(2, CLASSES, SIZE // 2**i, SIZE // 2**i, generator=made) for i in range(3)]
    criterion = criterion_of()
    found = DeepSupervisionLoss(MonaiLoss(criterion), weight_mode="exp")(levels, label)
    labels = label.as_tensor()[:, 0].long()
    expected = 0.0
    for i, level in enumerate(levels):
        small = nn.functional.interpolate(labels[:, None].float(), level.shape[-2:], mode="nearest-exact")[:, 0].long()
        expected = expected + 0.5**i * criterion(level, small)
    torch.testing.assert_close(torch.as_tensor(found), expected)
    several = MonaiLoss(MultiScaleLoss(criterion, [1.0, 0.5, 0.25]))(levels, label)
    at_full_size = sum(0.5**i * criterion.scaled(level, labels) for i, level in enumerate(levels))
    torch.testing.assert_close(several, at_full_size)


def test_modes_without_single_labels_take_floats_as_they_are() -> None:
    logits = torch.randn(2, 1, SIZE, SIZE)
    label = MetaTensor(torch.rand(2, 1, SIZE, SIZE))
    criterion = SemedaLoss(mode="binary")
    torch.testing.assert_close(MonaiLoss(criterion)(logits, label), criterion(logits, label.as_tensor()))
    planes, many = MetaTensor(torch.randint(0, 2, (2, 3, SIZE, SIZE))), SemedaLoss(mode="multilabel", num_classes=3)
    logits = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(MonaiLoss(many)(logits, planes), many(logits, planes.as_tensor()))


def test_labels_between_whole_numbers_are_an_error() -> None:
    data = batch(2)
    data["label"][0, 0, 3, 4] = 0.5
    with pytest.raises(ValueError, match=r"must hold whole numbers; resample labels with mode='nearest'"):
        MonaiLoss(criterion_of())(torch.randn(2, CLASSES, SIZE, SIZE), data["label"])


def test_what_is_no_criterion() -> None:
    with pytest.raises(TypeError, match="must be a SemedaLoss or a MultiScaleLoss, got DiceCELoss"):
        MonaiLoss(DiceCELoss())  # type: ignore[arg-type]


def test_sliding_window_inference_is_as_before() -> None:
    """The criterion is no part of the network: the evaluator gives what it gives without."""
    network, data = unet(3).eval(), [batch(3)]
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=data, network=network, inferer=SlidingWindowInferer((8, 8, 8), overlap=0.0)
    )
    evaluator.run()
    inferred = SlidingWindowInferer((8, 8, 8), overlap=0.0)(data[0]["image"], network)
    torch.testing.assert_close(torch.as_tensor(evaluator.state.output[0]["pred"]), torch.as_tensor(inferred[0]))
