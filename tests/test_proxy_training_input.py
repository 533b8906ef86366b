"""What train_proxy shows the network: void pixels, noise, temperature, the learning rate of each step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import TINY, same, scenes, weights

from semeda_fast import EdgeProxy, train_proxy
from semeda_fast.proxy.crops import VOID, fill_nearest
from semeda_fast.proxy.training import one_cycle, perturbed, resolve_temperature

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


def test_void_pixels_weigh_nothing_in_training() -> None:
    # Behind one convolution, void around a mask is the same as the convolution's own padding.
    options = {**TINY, "widths": (), "noise": 0.0, "val_masks": scenes(2), "steps": 10}
    exact, padded = (train_proxy(scenes(6, 12), 4, **{**options, "crop_size": crop_size}) for crop_size in (12, 19))
    for a, b in zip(weights(exact), weights(padded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_filling_takes_the_nearest_label(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 5, (15, 18), generator=generator).to(torch.int16)
    mask[torch.rand(mask.shape, generator=generator) < share] = VOID
    filled = fill_nearest(mask.clone())
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
    assert torch.equal(fill_nearest(mask), torch.full((4, 5), value, dtype=torch.int16))


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
    field = (scores[:, 0] - scores[:, 1])[:, :, 5:] - ((labels == 0).double() - (labels == 1).double())[:, :, 5:]
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


def test_the_learning_rate_of_each_step_follows_the_cycle() -> None:
    # The first step of Adam moves each weight by its learning rate, the second by nearly as much.
    for steps, share in ((1, one_cycle(0)), (2, one_cycle(0) + one_cycle(0.5))):
        proxy = train_proxy(scenes(3), 4, lr=0.01, seed=5, **{**TINY, "steps": steps})
        start = EdgeProxy(4, TINY["widths"], seed=5)
        moved = max(float((a - b).abs().max()) for a, b in zip(weights(proxy), weights(start), strict=True))
        assert moved == pytest.approx(0.01 * share, rel=0.02)
