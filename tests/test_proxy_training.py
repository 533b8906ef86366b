"""train_proxy: it learns, it repeats itself from its seed, and bad input says what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import semeda_fast
from semeda_fast import EdgeProxy, train_proxy
from semeda_fast.errors import MaskFileError
from semeda_fast.proxy.quality import edge_quality, measure_scales
from semeda_fast.proxy.training import VOID, _fill_nearest, one_cycle, perturbed, resolve_temperature

# As little as shows what a test is about.
TINY: dict[str, Any] = {
    "widths": (4, 6),
    "steps": 5,
    "batch_size": 4,
    "crop_size": 12,
    "progress": False,
}


def scenes(count: int, size: int = 40, num_classes: int = 4, *, seed: int = 0) -> Tensor:
    """Overlapping rectangles of random classes, [count,size,size] int64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    masks = torch.zeros(count, size, size, dtype=torch.int64)
    for mask in masks:
        for _ in range(6):
            y, x = draw(0, size - 6), draw(0, size - 6)
            mask[y : y + draw(5, size // 2), x : x + draw(5, size // 2)] = draw(0, num_classes)
    return masks


def weights(proxy: EdgeProxy) -> list[Tensor]:
    return [*proxy.weights, *proxy.biases]


def same(a: EdgeProxy, b: EdgeProxy) -> bool:
    """Bit for bit, in all that was learnt and measured."""
    return (
        all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
        and a.scales == b.scales
        and a.quality == b.quality
    )


class Items(Dataset[Any]):
    """Any items as a Dataset."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def write_folder(folder: Path, masks: Tensor) -> Path:
    folder.mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


# --- learning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> EdgeProxy:
    return train_proxy(scenes(24), 4, steps=60, batch_size=8, crop_size=32, progress=False)


def test_it_learns_to_find_edges(trained: EdgeProxy) -> None:
    unseen = scenes(8, seed=99)
    untrained = edge_quality(EdgeProxy(4), unseen)
    quality = edge_quality(trained, unseen)
    assert quality["edge_f1"] > 0.9 > 0.5 > untrained["edge_f1"]
    assert trained.quality["edge_f1"] > 0.9


def test_the_result_is_a_whole_proxy_that_survives_a_file(trained: EdgeProxy, tmp_path: Path) -> None:
    assert isinstance(trained, EdgeProxy)
    assert (trained.num_classes, trained.widths, trained.edge_classes) == (4, (16, 32), 2)
    assert all(not tensor.requires_grad and tensor.device.type == "cpu" for tensor in weights(trained))
    assert list(trained.parameters()) == []
    assert set(trained.scales) == {"l1", "l2", "smooth_l1"}
    assert trained.quality["held_out"] is True
    assert trained.quality["masks"] == 3  # a tenth of 24, rounded up
    provenance = trained.provenance
    expected = {
        "trained": True,
        "masks": "tensor [24, 40, 40]",
        "mask_count": 21,
        "edge_radius": 1,
        "void": "mask",
        "steps": 60,
        "batch_size": 8,
        "crop_size": 32,
        "seed": 0,
        "torch": torch.__version__,
    }
    assert {name: provenance[name] for name in expected} == expected
    assert provenance["temperature"] == pytest.approx(1 / math.log(27))
    assert provenance["seconds"] > 0
    trained.save(tmp_path / "a.safetensors")
    loaded = EdgeProxy.load(tmp_path / "a.safetensors")
    assert same(loaded, trained)
    assert loaded.provenance == provenance


def test_every_option_of_the_network_arrives() -> None:
    proxy = train_proxy(
        scenes(4),
        4,
        tap="post",
        distance="l2",
        layer_weights=(0, 1),
        kernel_size=5,
        radius=2,
        **{**TINY, "widths": (3,)},
    )
    assert [tuple(weight.shape) for weight in proxy.weights] == [(3, 4, 5, 5), (2, 3, 5, 5)]
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("post", "l2", (0.0, 1.0))
    assert proxy.provenance["edge_radius"] == 2


def test_the_radius_decides_what_is_learnt_and_measured() -> None:
    val = scenes(3, seed=5)
    thin, thick = (train_proxy(scenes(6), 4, val_masks=val, radius=radius, **TINY) for radius in (1, 3))
    assert not torch.equal(thin.weights[0], thick.weights[0])
    assert thick.quality == {**edge_quality(thick, val, radius=3), "held_out": True}
    assert thick.quality["edge_share"] > 1.5 * thin.quality["edge_share"]


# --- reproducibility --------------------------------------------------------------------------------------


def test_a_seed_decides_everything_bit_for_bit() -> None:
    masks = scenes(6)
    first = train_proxy(masks, 4, seed=1, **TINY)
    torch.manual_seed(12345)  # the global state must not matter
    again, other = train_proxy(masks, 4, seed=1, **TINY), train_proxy(masks, 4, seed=2, **TINY)
    assert same(first, again)
    assert all(not torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def test_the_global_random_states_are_left_alone() -> None:
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    train_proxy(scenes(4), 4, **TINY)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # type: ignore[index] # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_tensor_folder_dataset_and_array_agree(tmp_path: Path) -> None:
    masks = scenes(6)
    masks[:, 3:6, 7:20] = 255
    tensor = train_proxy(masks, 4, ignore_index=255, **TINY)
    sources: dict[str, Any] = {
        "a folder": write_folder(tmp_path / "masks", masks),
        "a folder's name": str(tmp_path / "masks"),
        "a Dataset": Items(list(masks)),
        "a Dataset of arrays": Items([mask.numpy().astype(np.uint8) for mask in masks]),
        "an array": masks.numpy(),
        "uint8": masks.to(torch.uint8),
        "int16": masks.to(torch.int16),
    }
    for name, source in sources.items():
        assert same(train_proxy(source, 4, ignore_index=255, **TINY), tensor), name


def test_the_provenance_names_a_folder_without_its_full_path(tmp_path: Path) -> None:
    proxy = train_proxy(write_folder(tmp_path / "masks", scenes(3)), 4, **TINY)
    assert proxy.provenance["masks"] == f"folder {tmp_path.name}/masks"
    assert proxy.provenance["mask_count"] == 2


def test_masks_of_several_sizes_and_smaller_than_a_crop() -> None:
    masks = [scenes(1, size)[0][:, : size - 3] for size in (12, 15, 30)]
    proxy = train_proxy(Items(masks), 4, val_fraction=0, **{**TINY, "crop_size": 20})
    assert proxy.quality["pixels"] == sum(mask.numel() for mask in masks)
    assert all(tensor.isfinite().all() for tensor in weights(proxy))


def test_the_masks_are_not_modified() -> None:
    masks = scenes(4)
    masks[:, :5] = 255
    kept = masks.clone()
    train_proxy(masks, 4, ignore_index=255, void="nearest", **TINY)
    assert torch.equal(masks, kept)


def test_an_accelerator_of_the_caller_gives_the_same_and_keeps_nothing(tmp_path: Path) -> None:
    masks = scenes(4)
    accelerator = Accelerator(cpu=True)
    assert same(train_proxy(masks, 4, accelerator=accelerator, **TINY), train_proxy(masks, 4, **TINY))
    accelerator.save_state(str(tmp_path))  # must not store the proxy's network among the caller's
    left = [name for name in os.listdir(tmp_path) if not name.startswith("random_states")]
    assert left == []


# --- masks held out ----------------------------------------------------------------------------------------


def test_val_masks_are_what_is_measured_and_all_masks_are_trained_on() -> None:
    masks, val = scenes(5), scenes(3, 30, seed=7)
    val[:, 10:14] = 255
    proxy = train_proxy(masks, 4, ignore_index=255, val_masks=val, **TINY)
    assert proxy.quality == {**edge_quality(proxy, val, ignore_index=255), "held_out": True}
    assert proxy.scales == measure_scales(proxy, val, ignore_index=255)
    assert proxy.provenance["mask_count"] == 5
    other = train_proxy(masks, 4, ignore_index=255, val_masks=scenes(2, seed=8), **TINY)
    assert all(torch.equal(a, b) for a, b in zip(weights(proxy), weights(other), strict=True))
    assert other.quality != proxy.quality


def test_val_masks_may_be_a_folder_while_masks_are_a_tensor(tmp_path: Path) -> None:
    val = scenes(2, seed=7)
    folder = write_folder(tmp_path / "val", val)
    assert same(
        train_proxy(scenes(4), 4, val_masks=folder, **TINY), train_proxy(scenes(4), 4, val_masks=val, **TINY)
    )


def test_masks_held_out_are_not_trained_on() -> None:
    masks = scenes(4)
    proxy = train_proxy(masks, 4, val_fraction=0.5, **TINY)
    held = [
        pair
        for pair in itertools.combinations(range(4), 2)
        if proxy.quality == {**edge_quality(proxy, masks[list(pair)]), "held_out": True}
    ]
    assert len(held) == 1
    assert proxy.provenance["mask_count"] == 2
    for number in range(4):
        changed = masks.clone()
        changed[number] = scenes(1, seed=50 + number)[0]
        again = train_proxy(changed, 4, val_fraction=0.5, **TINY)
        assert torch.equal(again.weights[0], proxy.weights[0]) == (number in held[0])


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(4, 0.0, 0), (1, 0.1, 0), (4, 0.1, 1), (5, 0.5, 3), (3, 0.99, 2), (21, 0.1, 3)],
)
def test_the_number_of_masks_held_out(count: int, fraction: float, held: int) -> None:
    proxy = train_proxy(scenes(count, 16), 4, val_fraction=fraction, **{**TINY, "steps": 1})
    assert proxy.quality["held_out"] is (held > 0)
    assert proxy.quality["masks"] == (held or count)
    assert proxy.provenance["mask_count"] == count - held


# --- void -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("void", ["mask", "nearest"])
def test_the_number_that_marks_void_does_not_matter(void: str) -> None:
    masks = scenes(4)
    results = []
    for ignore_index in (255, -1, -100, 4):
        marked = masks.clone()
        marked[:, 5:9, 10:] = ignore_index
        results.append(train_proxy(marked, 4, ignore_index=ignore_index, void=void, **TINY))
    assert all(same(result, results[0]) for result in results[1:])
    # where label 0 is the void, the classes are others
    assert not same(train_proxy(masks, 4, ignore_index=0, void=void, **TINY), results[0])


def striped() -> tuple[Tensor, Tensor]:
    """Masks with void strips whose nearest labels are unambiguous, and the same masks filled by hand."""
    marked = torch.zeros(4, 12, 12, dtype=torch.int64)
    marked[:, :, 6:] = torch.tensor([1, 2, 3, 1]).reshape(4, 1, 1)
    filled = marked.clone()
    marked[:, :, 4:8] = 255
    return marked, filled


def test_nearest_trains_as_if_the_masks_had_been_filled() -> None:
    marked, filled = striped()
    val = scenes(2, seed=3)
    options = {**TINY, "ignore_index": 255, "val_masks": val}  # crops are as large as the masks
    nearest = train_proxy(marked, 4, void="nearest", **options)
    assert same(nearest, train_proxy(filled, 4, void="mask", **options))
    masked = train_proxy(marked, 4, void="mask", **{**options, "val_masks": scenes(2, seed=3)}, radius=5)
    assert not torch.equal(masked.weights[0], nearest.weights[0])
    assert (nearest.provenance["void"], masked.provenance["void"]) == ("nearest", "mask")


def test_mask_trains_on_no_void_pixel() -> None:
    # Every edge lies under void, so that only a training that looks there can see one.
    marked, _ = striped()
    with pytest.raises(ValueError, match="the masks hold no edge"):
        train_proxy(marked, 4, ignore_index=255, void="mask", **TINY)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_filling_takes_the_nearest_label(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 5, (15, 18), generator=generator).to(torch.int16)
    mask[torch.rand(mask.shape, generator=generator) < share] = VOID
    filled = _fill_nearest(mask.clone())
    assert filled.dtype == mask.dtype
    places = (mask != VOID).nonzero()
    for y, x in itertools.product(range(15), range(18)):
        squared = ((places - torch.tensor([y, x])) ** 2).sum(dim=1)
        nearest = {int(mask[v, u]) for v, u in places[squared == squared.min()].tolist()}
        assert int(filled[y, x]) in nearest
        if mask[y, x] != VOID:
            assert filled[y, x] == mask[y, x]


@pytest.mark.parametrize("value", [VOID, 3])
def test_filling_leaves_masks_of_void_alone_and_of_no_void_as_they_are(value: int) -> None:
    mask = torch.full((4, 5), value, dtype=torch.int16)
    assert torch.equal(_fill_nearest(mask), torch.full((4, 5), value, dtype=torch.int16))


def test_crops_of_void_alone_do_no_harm() -> None:
    masks = scenes(6)
    masks[1:4] = 255  # with one mask a batch, whole steps see nothing
    for void in ("mask", "nearest"):
        proxy = train_proxy(masks, 4, ignore_index=255, void=void, **{**TINY, "batch_size": 1, "steps": 20})
        assert all(tensor.isfinite().all() for tensor in weights(proxy))


# --- the perturbed input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 21, 150])
def test_without_noise_the_automatic_temperature_peaks_at_nine_tenths(num_classes: int) -> None:
    labels = torch.tensor([[[0, num_classes - 1], [1, VOID]]])
    heat = resolve_temperature("auto", num_classes)
    probs = perturbed(labels, num_classes, 0.0, heat, torch.Generator())
    assert probs.shape == (1, num_classes, 2, 2)
    assert probs.dtype == torch.float32
    for y, x, label in ((0, 0, 0), (0, 1, num_classes - 1), (1, 0, 1)):
        pixel = probs[0, :, y, x]
        assert float(pixel[label]) == pytest.approx(0.9, abs=1e-5)
        others = torch.cat([pixel[:label], pixel[label + 1 :]])
        torch.testing.assert_close(others, torch.full_like(others, 0.1 / (num_classes - 1)))
    assert (probs[0, :, 1, 1] == 0).all()


def test_a_temperature_of_one_is_the_softmax_of_the_one_hot_map() -> None:
    probs = perturbed(torch.zeros(1, 1, 1, dtype=torch.int64), 21, 0.0, 1.0, torch.Generator())
    assert float(probs[0, 0, 0, 0]) == pytest.approx(math.e / (math.e + 20))


@pytest.mark.parametrize(("noise", "heat"), [(0.1, 0.3), (1.0, 1.0)])
def test_the_noise_has_the_deviation_asked_for(noise: float, heat: float) -> None:
    labels = torch.randint(0, 3, (2, 60, 60), generator=torch.Generator().manual_seed(0))
    labels[:, :, :5] = VOID
    probs = perturbed(labels, 3, noise, heat, torch.Generator().manual_seed(1))
    valid = labels != VOID
    torch.testing.assert_close(probs.sum(dim=1), valid.float())
    assert (probs >= 0).all()
    # heat * log(p_a / p_b) = (onehot_a - onehot_b) + noise * (n_a - n_b)
    scores = heat * probs.double().clamp_min(1e-30).log()
    for a, b in ((0, 1), (1, 2), (2, 0)):
        difference = (scores[:, a] - scores[:, b])[valid]
        clean = ((labels == a).double() - (labels == b).double())[valid]
        rest = difference - clean
        assert float(rest.mean()) == pytest.approx(0.0, abs=0.06 * noise)
        assert float(rest.std()) == pytest.approx(noise * math.sqrt(2), rel=0.05)
    # neighbours and images are independent
    field = (scores[:, 0] - scores[:, 1])[:, :, 5:] - ((labels == 0).double() - (labels == 1).double())[
        :, :, 5:
    ]
    field = field / field.std()
    assert abs(float((field[:, :, 1:] * field[:, :, :-1]).mean())) < 0.06
    assert abs(float((field[0] * field[1]).mean())) < 0.06


def test_the_generator_decides_the_noise() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    first, again = (perturbed(labels, 3, 0.5, 1.0, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, perturbed(labels, 3, 0.5, 1.0, torch.Generator().manual_seed(5)))


def test_noise_and_temperature_reach_the_training() -> None:
    masks = scenes(4)
    plain = train_proxy(masks, 4, **TINY)
    changes: list[dict[str, Any]] = [{"noise": 0.5}, {"noise": 0.0}, {"temperature": 1.0}, {"lr": 1e-3}]
    for change in changes:
        proxy = train_proxy(masks, 4, **TINY, **change)
        assert not torch.equal(proxy.weights[0], plain.weights[0]), change
        assert {name: proxy.provenance[name] for name in change} == change


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "hot", ""])
def test_a_bad_temperature_is_refused(temperature: float | str) -> None:
    with pytest.raises(ValueError, match=f"a positive number or 'auto', got {temperature!r}"):
        resolve_temperature(temperature, 5)


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero() -> None:
    shares = [one_cycle(step / 1000) for step in range(1001)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[100] == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    assert all(a < b for a, b in itertools.pairwise(shares[:101]))
    assert all(a > b for a, b in itertools.pairwise(shares[100:]))
    assert max(abs(a - b) for a, b in itertools.pairwise(shares)) < 0.01  # no jump


# --- what is printed --------------------------------------------------------------------------------------


def test_without_progress_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    train_proxy(scenes(3), 4, **TINY)
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_beside_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    train_proxy(scenes(3), 4, **{**TINY, "progress": True})
    out, err = capfd.readouterr()
    assert out == ""
    assert "train proxy" in err
    assert "5/5" in err
    assert "loss=" in err


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"void": "skip"}, "void must be 'mask' or 'nearest', got 'skip'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"crop_size": -4}, "crop_size must be at least 1, got -4"),
        ({"noise": -0.1}, "noise must be >= 0"),
        ({"noise": float("nan")}, "noise must be >= 0"),
        ({"noise": float("inf")}, "noise must be >= 0"),
        ({"lr": 0.0}, "lr > 0, got 0.1 and 0.0"),
        ({"lr": float("nan")}, "lr > 0"),
        ({"temperature": 0.0}, "temperature must be a positive number or 'auto', got 0"),
        ({"temperature": "warm"}, "temperature must be a positive number or 'auto', got 'warm'"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1"),
        ({"val_fraction": -0.1}, r"val_fraction must lie in \[0, 1\), got -0.1"),
        ({"radius": 0}, "radius must be at least 1 pixel, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"widths": (0,)}, "at least 1 channel"),
        ({"tap": "mid"}, "tap must be one of"),
        ({"distance": "cosine"}, "distance must be one of"),
        ({"layer_weights": (1,)}, "the proxy has 3 layers, got 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_proxy(scenes(3), **{"num_classes": 4, **TINY, **options})


@pytest.mark.parametrize("shape", [(40, 40), (2, 1, 40, 40), (40,)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the shape \[M,H,W\], got \[" + ", ".join(map(str, shape))):
        train_proxy(torch.zeros(shape, dtype=torch.int64), 4, **TINY)


@pytest.mark.parametrize(
    "masks", [3, None, object(), (mask for mask in scenes(2))], ids=lambda x: type(x).__name__
)
def test_what_is_no_source_of_masks_is_refused(masks: Any) -> None:
    message = r"a tensor \[M,H,W\], a folder or a Dataset with a length, got " + type(masks).__name__
    with pytest.raises(TypeError, match=message):
        train_proxy(masks, 4, **TINY)
    if masks is not None:
        with pytest.raises(TypeError, match=message):
            train_proxy(scenes(2), 4, val_masks=masks, **TINY)


@pytest.mark.parametrize(
    "masks", [torch.zeros(0, 4, 4, dtype=torch.int64), Items([])], ids=["tensor", "Dataset"]
)
def test_no_mask_at_all_is_refused(masks: Any) -> None:
    with pytest.raises(ValueError, match="is empty"):
        train_proxy(masks, 4, **TINY)
    with pytest.raises(ValueError, match="is empty"):
        train_proxy(scenes(2), 4, val_masks=masks, **TINY)


def test_labels_out_of_range_name_the_mask_the_range_and_ignore_index() -> None:
    masks = scenes(3)
    masks[1, 0, 0] = 255
    masks[1, 0, 1] = -7
    with pytest.raises(
        ValueError, match="mask 1 holds labels from -7 to 255, expected 0 to 3 or ignore_index=-100"
    ):
        train_proxy(masks, 4, val_fraction=0, **{**TINY, "steps": 20})
    masks[1] = 0
    masks[1, 3, 3] = 4
    with pytest.raises(ValueError, match="mask 1 holds labels from 0 to 4, expected 0 to 3"):
        train_proxy(scenes(2), 4, val_masks=masks, **TINY)


def test_uint8_labels_are_not_wrapped_to_ignore_index() -> None:
    masks = scenes(3).to(torch.uint8)
    masks[:, 0, 0] = 156  # -100 modulo 256
    with pytest.raises(ValueError, match="from 0 to 156, expected 0 to 3 or ignore_index=-100"):
        train_proxy(masks, 4, **TINY)


@pytest.mark.parametrize(
    "item",
    [
        torch.zeros(4, 4),
        torch.zeros(1, 4, 4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
        (torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.int64)),
        {"mask": torch.zeros(4, 4, dtype=torch.int64)},
        None,
    ],
    ids=["floats", "a channel", "one row", "no pixel", "image and mask", "a dict", "None"],
)
def test_items_that_are_no_masks_are_refused_by_their_number(item: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="mask 0 "):
        train_proxy(Items([item]), 4, **TINY)


@pytest.mark.parametrize("value", [0, 3, 255])
def test_masks_without_an_edge_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"the masks hold no edge: .*check num_classes and masks"):
        train_proxy(torch.full((3, 16, 16), value), 4, ignore_index=255, **TINY)


def test_a_missing_an_empty_and_a_broken_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no"))):
        train_proxy(tmp_path / "no", 4, **TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "empty"))):
        train_proxy(str(tmp_path / "empty"), 4, **TINY)
    folder = write_folder(tmp_path / "masks", scenes(3))
    image = folder / "001.png"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(MaskFileError, match=r"001\.png"):
        train_proxy(folder, 4, val_fraction=0, **{**TINY, "steps": 20})
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(image)
    with pytest.raises(MaskFileError, match=r"001\.png .*9"):
        train_proxy(folder, 4, val_fraction=0, **{**TINY, "steps": 20})


class Without:
    """An import finder that behaves as if a package were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("package", ["accelerate", "tqdm"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(
        ImportError, match=rf"train_proxy needs .*'{package}'.* pip install 'semeda-fast\[train\]'"
    ):
        train_proxy(scenes(3), 4, **TINY)


def test_nearest_without_scipy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    masks = scenes(3)
    masks[:, :8] = 255
    with pytest.raises(
        ImportError, match=r"void='nearest' needs .*'scipy'.* pip install 'semeda-fast\[train\]'"
    ):
        train_proxy(masks, 4, ignore_index=255, void="nearest", **TINY)


# --- several processes ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
from accelerate import PartialState
from semeda_fast import train_proxy

masks = torch.load(sys.argv[1])
options = json.loads(sys.argv[2])
proxy = train_proxy(masks, 4, noise=0.0, **options)
noisy = train_proxy(masks, 4, **options)
try:
    train_proxy(masks, 4, **{**options, "batch_size": 3})
except ValueError as error:
    message = str(error)
state = PartialState()
torch.save(
    {
        "world": state.num_processes,
        "message": message,
        "weights": proxy.weights + proxy.biases,
        "noisy": noisy.weights + noisy.biases,
        "quality": proxy.quality,
        "scales": proxy.scales,
    },
    f"{sys.argv[3]}/{state.process_index}.pt",
)
"""


def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    masks = scenes(6)
    torch.save(masks, tmp_path / "masks.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    options = {**TINY, "crop_size": 20, "steps": 8}
    package = str(Path(semeda_fast.__file__).resolve().parents[1])
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    # accelerate's --cpu starts one process (more need MPI), so the GPU launcher it is, without a GPU.
    launch += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [
            *launch,
            str(tmp_path / "script.py"),
            str(tmp_path / "masks.pt"),
            json.dumps(options),
            str(tmp_path),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["world"] == second["world"] == 2
    for name in ("weights", "noisy"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
    assert (first["quality"], first["scales"]) == (second["quality"], second["scales"])
    assert "batch_size=3 must be a multiple of the 2 processes" in first["message"]
    # Without void each half of a batch weighs the same; without noise nothing but rounding remains.
    alone = train_proxy(masks, 4, noise=0.0, **options)
    for a, b in zip(first["weights"], weights(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
