"""The bundled universal proxy: small, for any number of classes, and good on masks that it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semeda_fast import EdgeProxy
from semeda_fast.proxy import MaskFolder, SyntheticMasks
from semeda_fast.proxy.quality import edge_quality
from semeda_fast.proxy.storage import BUNDLED
from semeda_fast.proxy.universal import REPORTED_CLASSES, VAL_SEED

CAMVID = Path(__file__).resolve().parents[2] / "shared" / "data" / "camvid" / "val" / "masks"


def test_the_file_is_small_and_says_where_it_comes_from() -> None:
    assert BUNDLED.stat().st_size < 300_000
    proxy = EdgeProxy.load(BUNDLED)
    assert proxy.num_classes == 256
    assert proxy.widths == (16, 32)
    assert proxy.edge_classes == 2
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("pre", "l1", (1.0, 1.0, 1.0))
    assert proxy.provenance["universal"] is True
    assert {"steps", "noise", "temperature", "seed", "void", "edge_radius"} <= set(proxy.provenance)
    assert proxy.quality["held_out"] is True
    assert set(proxy.scales) == {"l1", "l2", "smooth_l1"}


@pytest.mark.parametrize("num_classes", REPORTED_CLASSES)
def test_edge_f1_on_unseen_synthetic_masks(num_classes: int) -> None:
    """The stored figure is the measured one, on masks of 0.9 and better."""
    masks = SyntheticMasks(100, num_classes, (96, 96), seed=VAL_SEED)
    f1 = edge_quality(EdgeProxy.bundled(num_classes), masks)["edge_f1"]
    stored = EdgeProxy.bundled(num_classes).quality["edge_f1_by_classes"][str(num_classes)]
    assert f1 == pytest.approx(stored, abs=0.005)  # another version of Pillow may draw a pixel otherwise
    assert f1 >= 0.9


def test_edge_f1_on_camvid() -> None:
    if not CAMVID.is_dir():
        pytest.skip(f"{CAMVID.parents[1].name} masks are not here; their licence keeps them out of the repository")
    masks = MaskFolder(CAMVID, num_classes=11, ignore_index=11)
    every_tenth = torch.utils.data.Subset(masks, range(0, len(masks), 10))
    assert edge_quality(EdgeProxy.bundled(11), every_tenth, ignore_index=11)["edge_f1"] >= 0.9


@pytest.mark.parametrize("num_classes", [1, 2, 21, 255, 256])
def test_any_number_of_classes(num_classes: int) -> None:
    proxy = EdgeProxy.bundled(num_classes)
    assert proxy.num_classes == num_classes
    assert proxy.features(torch.zeros(1, num_classes, 8, 8))[-1].shape == (1, 2, 8, 8)


def test_each_call_gives_its_own_copy() -> None:
    first = EdgeProxy.bundled(3)
    first.weights[0].zero_()
    assert EdgeProxy.bundled(3).weights[0].any()
    assert EdgeProxy.bundled(256).weights[0].data_ptr() != EdgeProxy.bundled(256).weights[0].data_ptr()
