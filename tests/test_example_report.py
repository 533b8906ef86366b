"""What a finished run of examples/train.py leaves: the labels predicted, whatever their number."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from semeda_fast.proxy import read_mask

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from data import Pairs  # noqa: E402
from report import draw_predictions  # noqa: E402


class Knows(nn.Module):
    """A network that predicts the labels that it was given."""

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.labels, self.num_classes = torch.from_numpy(labels.astype(np.int64)), num_classes

    def forward(self, images: Tensor) -> Tensor:
        logits = nn.functional.one_hot(self.labels, self.num_classes).permute(2, 0, 1)[None]
        return self.scale * logits.float()


@pytest.mark.parametrize(("num_classes", "bits"), [(3, 8), (256, 8), (257, 16), (300, 16)])
def test_predictions_keep_their_labels(tmp_path: Path, num_classes: int, bits: int) -> None:
    labels = (np.arange(24 * 30).reshape(24, 30) * 7 % num_classes).astype(np.uint16)
    labels[0, 0] = num_classes - 1
    Image.fromarray(labels).save(tmp_path / "mask.png")
    Image.new("RGB", (30, 24), (90, 80, 70)).save(tmp_path / "image.png")
    dataset = Pairs([(tmp_path / "image.png", tmp_path / "mask.png")], num_classes=num_classes, ignore_index=-100)
    network = Knows(labels, num_classes)
    draw_predictions(tmp_path, network, dataset, [0], [str(number) for number in range(num_classes)])
    written = tmp_path / "predictions" / "mask.png"
    assert written.read_bytes()[24] == bits  # of IHDR
    np.testing.assert_array_equal(read_mask(written, num_classes=num_classes), labels)
    assert (tmp_path / "predictions.png").stat().st_size > 0
