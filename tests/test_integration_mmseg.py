"""mmengine's registry, with the call of MMSegmentation's decode heads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import semeda_fast

pytest.importorskip("mmengine", reason="`make test-integrations` has it")
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

import semeda_fast.integrations.mmseg

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES, SIZE, VOID = 5, 24, 255


def inputs(dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    label = torch.randint(0, CLASSES, (2, SIZE, SIZE), generator=made).to(dtype)
    label[:, :5] = VOID
    return torch.randn(2, CLASSES, SIZE, SIZE, generator=made), label


def built(**options: Any) -> nn.Module:
    return MODELS.build({"type": "SemedaLoss", "num_classes": CLASSES, **options})


def plain(**options: Any) -> semeda_fast.SemedaLoss:
    return semeda_fast.SemedaLoss(num_classes=CLASSES, ignore_index=VOID, **options)


def test_a_config_builds_it() -> None:
    text = 'custom_imports = dict(imports=["semeda_fast.integrations.mmseg"], allow_failed_imports=False)\n'
    text += 'model = dict(loss_decode=dict(type="SemedaLoss", num_classes=5, loss_weight=0.4, weight=[1, 1, 2, 1, 3]))'
    loss = MODELS.build(Config.fromstring(text, ".py").model.loss_decode)
    pred, label = inputs()
    expected = 0.4 * plain(weight=[1.0, 1, 2, 1, 3])(pred, label)
    torch.testing.assert_close(loss(pred, label, weight=None, ignore_index=VOID), expected)
    assert loss.loss_name == "loss_semeda"
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_the_call_of_a_decode_head(dtype: torch.dtype) -> None:
    pred, label = inputs(dtype)
    weight = torch.rand(label.shape)
    found = built()(pred, label, weight=weight, ignore_index=VOID)
    torch.testing.assert_close(found, plain()(pred, label, pixel_weight=weight))


def test_the_void_label_of_the_call_holds() -> None:
    pred, label = inputs()
    loss = built()
    torch.testing.assert_close(loss(pred, label), plain()(pred, label))
    few = torch.where(label == VOID, 2, label)
    for ignore, of_call in ((2, 2), (None, -100)):
        expected = semeda_fast.SemedaLoss(num_classes=CLASSES, ignore_index=of_call)(pred, few)
        torch.testing.assert_close(loss(pred, few, ignore_index=ignore), expected)


@pytest.mark.parametrize("override", ["none", "sum", "mean"])
def test_the_reduction_of_the_call_holds_for_it_alone(override: str) -> None:
    pred, label = inputs()
    loss = built()
    found = loss(pred, label, reduction_override=override)
    torch.testing.assert_close(found, plain(reduction=override)(pred, label))
    torch.testing.assert_close(loss(pred, label), plain()(pred, label))


def test_avg_factor_is_the_divisor() -> None:
    pred, label = inputs()
    expected = plain(reduction="sum")(pred, label) / 100
    torch.testing.assert_close(built()(pred, label, avg_factor=100), expected)
    torch.testing.assert_close(built()(pred, label, avg_factor=torch.tensor(100.0)), expected)
    with pytest.raises(ValueError, match="avg_factor divides a mean, and the reduction is 'sum'"):
        built()(pred, label, avg_factor=100, reduction_override="sum")


def test_what_is_wrong_is_said() -> None:
    pred, label = inputs()
    with pytest.raises(ValueError, match="reduction_override must be None or one of"):
        built()(pred, label, reduction_override="max")
    with pytest.raises(ValueError, match="loss_name must hold 'loss'"):
        built(loss_name="semeda")


def test_mmengines_runner_trains_with_it(tmp_path: Any) -> None:
    """Its model sums what has `loss` in its name, and steps."""
    from mmengine.model import BaseModel

    class Segmenter(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Conv2d(3, CLASSES, 3, padding=1)
            self.loss_decode = built()

        def forward(self, images: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return {self.loss_decode.loss_name: self.loss_decode(self.head(images), labels, weight=None)}

    data = [(torch.randn(3, SIZE, SIZE), inputs()[1][0]) for _ in range(4)]
    model = Segmenter()
    before = model.head.weight.detach().clone()
    images, labels = (torch.stack(each) for each in zip(*data, strict=True))
    whole = [float(model(images, labels)["loss_semeda"])]
    runner = Runner(
        model=model, work_dir=str(tmp_path), train_dataloader={
            "dataset": data, "batch_size": 2, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        }, train_cfg={"by_epoch": True, "max_epochs": 5}, log_level="ERROR", experiment_name="semeda",
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, default_scope="mmengine",
    )  # fmt: skip
    runner.train()
    whole.append(float(model(images, labels)["loss_semeda"]))
    assert whole[1] < whole[0]
    assert not torch.equal(before, model.head.weight)
    saved = torch.load(tmp_path / "epoch_5.pth", weights_only=False)["state_dict"]
    assert set(saved) == {"head.weight", "head.bias"}


def test_mmsegmentations_registry_finds_it() -> None:
    """With mmcv-lite: mmseg itself imports, its decode heads need the compiled mmcv."""
    pytest.importorskip("mmseg", reason="`make test-integrations` has it")
    code = (
        "import semeda_fast.integrations.mmseg\n"
        "from mmengine.registry import DefaultScope\n"
        "from mmseg.registry import MODELS\n"
        "MODELS._locations = []  # its own losses import mmcv's compiled operators\n"
        "loss = MODELS.build(dict(type='SemedaLoss', num_classes=5))\n"
        "assert type(loss).__module__ == 'semeda_fast.integrations.mmseg', type(loss)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
