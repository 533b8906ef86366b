"""Edge F1 against a slow count, and layer scales against a form written from their definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_form import Layer, rho, taps
from torch import Tensor
from torch.utils.data import Dataset
from training_fixtures import scenes

from semeda_fast import EdgeProxy, semeda_loss
from semeda_fast.functional import LossComponents
from semeda_fast.proxy.quality import corrupted, edge_quality, measure_scales, one_hot
from semeda_fast.proxy.record import ProxyLayer

DISTANCES = ("l1", "l2", "smooth_l1")
C = 4


class Items(Dataset[Tensor]):
    """Masks of any sizes."""

    def __init__(self, masks: list[Tensor]) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Tensor:
        return self.masks[index]


def blocky(n: int, h: int, w: int, *, void: float = 0.0, ignore_index: int = 255, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, C, (n, h // 4 + 1, w // 4 + 1), generator=generator)
    masks = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :h, :w].clone()
    masks[torch.rand(masks.shape, generator=generator) < void] = ignore_index
    return masks


def random_proxy(tap: str = "pre", edge_classes: int = 2, **options: Any) -> EdgeProxy:
    generator = torch.Generator().manual_seed(2)
    layers = [ProxyLayer(C, 5), ProxyLayer(5, 4), ProxyLayer(4, edge_classes)]
    weights = [torch.randn((x.out_channels, x.in_channels, 3, 3), generator=generator) for x in layers]
    biases = [torch.randn(x.out_channels, generator=generator) for x in layers]
    return EdgeProxy.from_tensors(layers, weights, biases, tap=tap, **options)


def slow_one_hot(mask: list[list[int]], ignore_index: int) -> np.ndarray:
    q = np.zeros((C, len(mask), len(mask[0])))
    for y, row in enumerate(mask):
        for x, label in enumerate(row):
            if label != ignore_index:
                q[label, y, x] = 1
    return q


def numpy_layers(proxy: EdgeProxy) -> list[Layer]:
    return [
        Layer(weight.double().numpy(), bias.double().numpy())
        for weight, bias in zip(proxy.weights, proxy.biases, strict=True)
    ]


# --- edge F1 ----------------------------------------------------------------------------------------------


def slow_quality(proxy: EdgeProxy, masks: list[Tensor], radius: int, ignore_index: int) -> dict[str, float]:
    """Counted pixel by pixel."""
    hits = wrong = missed = pixels = 0
    for labels in masks:
        mask = labels.tolist()
        logits = taps(slow_one_hot(mask, ignore_index), numpy_layers(proxy), "pre")[-1]
        height, width = labels.shape
        for y in range(height):
            for x in range(width):
                if mask[y][x] == ignore_index:
                    continue
                pixels += 1
                window = [
                    mask[v][u]
                    for v in range(max(0, y - radius), min(height, y + radius + 1))
                    for u in range(max(0, x - radius), min(width, x + radius + 1))
                ]
                edge = any(label not in (ignore_index, mask[y][x]) for label in window)
                found = all(logits[-1, y, x] > other for other in logits[:-1, y, x])
                hits += edge and found
                wrong += found and not edge
                missed += edge and not found
    precision, recall = hits / (hits + wrong), hits / (hits + missed)
    return {
        "edge_f1": 2 * precision * recall / (precision + recall),
        "edge_precision": precision,
        "edge_recall": recall,
        "edge_share": (hits + missed) / pixels,
        "masks": len(masks),
        "pixels": pixels,
    }


@pytest.mark.parametrize(
    ("radius", "void", "ignore_index", "edge_classes"), [(1, 0.0, -100, 2), (1, 0.3, 255, 2), (2, 0.2, -1, 3)]
)
def test_edge_quality_matches_a_slow_count(radius: int, void: float, ignore_index: int, edge_classes: int) -> None:
    proxy = random_proxy(edge_classes=edge_classes)
    masks = blocky(3, 13, 18, void=void, ignore_index=ignore_index)
    quality = edge_quality(proxy, masks, radius=radius, ignore_index=ignore_index)
    expected = slow_quality(proxy, list(masks), radius, ignore_index)
    assert 0.05 < expected["edge_precision"] < 0.95  # else the comparison shows little
    assert 0.05 < expected["edge_recall"] < 0.95
    assert quality == pytest.approx(expected, rel=1e-12)


def test_edge_quality_of_masks_of_several_sizes_and_small_dtypes() -> None:
    proxy = random_proxy()
    masks = [blocky(1, 9, 16, seed=1)[0].to(torch.uint8), blocky(1, 20, 7, seed=2)[0].to(torch.int16)]
    expected = slow_quality(proxy, masks, 1, -100)
    assert edge_quality(proxy, Items(masks)) == pytest.approx(expected, rel=1e-12)


def test_a_perfect_and_a_blind_proxy() -> None:
    # Two classes in columns: a pixel is an edge where a neighbour column differs, which two filters can tell.
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0, 1, 0], weight[0, 0, 1, 2] = 1.0, -1.0  # |left - right|
    weight[1, 0, 1, 0], weight[1, 0, 1, 2] = -1.0, 1.0
    head = torch.zeros(2, 2, 1, 1)
    head[1] = 1.0
    layers = [ProxyLayer(2, 2), ProxyLayer(2, 2, 1)]
    masks = torch.zeros(2, 6, 12, dtype=torch.int64)
    masks[:, :, 4:8] = 1
    masks[:, :, [0, 11]] = 255  # the border would look like an edge
    masks[:, :, 1] = masks[:, :, 10] = 255
    perfect = EdgeProxy.from_tensors(layers, [weight, head], [torch.zeros(2), torch.tensor([0.5, 0.0])])
    quality = edge_quality(perfect, masks, ignore_index=255)
    # columns 2 and 9 lie at void, whose zero vector differs from class 0: two false alarms a row
    assert quality["edge_recall"] == 1.0
    assert quality["edge_precision"] == pytest.approx(4 / 6)
    assert quality["edge_f1"] == pytest.approx(0.8)
    assert (quality["masks"], quality["pixels"]) == (2, 2 * 6 * 8)
    assert quality["edge_share"] == pytest.approx(0.5)
    blind = EdgeProxy.from_tensors(layers, [weight, head], [torch.zeros(2), torch.tensor([9.0, 0.0])])
    quality = edge_quality(blind, masks, ignore_index=255)
    assert quality["edge_f1"] == quality["edge_precision"] == quality["edge_recall"] == 0.0


def test_masks_of_void_alone_give_zeros_and_not_nan() -> None:
    masks = torch.full((2, 5, 5), 255)
    quality = edge_quality(random_proxy(), masks, ignore_index=255)
    assert quality == {
        "edge_f1": 0.0,
        "edge_precision": 0.0,
        "edge_recall": 0.0,
        "edge_share": 0.0,
        "masks": 2,
        "pixels": 0,
    }
    assert measure_scales(random_proxy(), masks, ignore_index=255) == dict.fromkeys(DISTANCES, (1.0, 1.0, 1.0))


# --- scales -----------------------------------------------------------------------------------------------


def slow_corruption(mask: list[list[int]], ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and its corruption: a quarter of each pixel goes to the rotated mask's label."""
    height, width = len(mask), len(mask[0])
    q = slow_one_hot(mask, ignore_index)
    p = 0.75 * q
    for y in range(height):
        for x in range(width):
            if mask[y][x] == ignore_index:
                continue
            other = mask[height - 1 - y][width - 1 - x]
            p[mask[y][x] if other == ignore_index else other, y, x] += 0.25
    return q, p


def slow_scales(proxy: EdgeProxy, masks: list[Tensor], ignore_index: int) -> dict[str, list[float]]:
    sums = {distance: [0.0] * proxy.num_layers for distance in DISTANCES}
    pixels = 0
    for labels in masks:
        mask = labels.tolist()
        q, p = slow_corruption(mask, ignore_index)
        valid = np.array(mask) != ignore_index
        pixels += int(valid.sum())
        layers = numpy_layers(proxy)
        for number, (a, b) in enumerate(zip(taps(p, layers, proxy.tap), taps(q, layers, proxy.tap), strict=True)):
            for distance in DISTANCES:
                sums[distance][number] += float(rho(a - b, distance).mean(axis=0)[valid].sum())
    return {distance: [value / pixels for value in values] for distance, values in sums.items()}


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize(("void", "ignore_index"), [(0.0, -100), (0.3, 255), (0.3, -1)])
def test_scales_match_their_definition(tap: str, void: float, ignore_index: int) -> None:
    proxy = random_proxy(tap)
    masks = [
        blocky(1, 11, 14, void=void, ignore_index=ignore_index, seed=1)[0],
        blocky(1, 8, 21, void=void, ignore_index=ignore_index, seed=2)[0],
    ]
    scales = measure_scales(proxy, Items(masks), ignore_index=ignore_index)
    expected = slow_scales(proxy, masks, ignore_index)
    assert set(scales) == set(DISTANCES)
    for distance in DISTANCES:
        assert scales[distance] == pytest.approx(expected[distance], rel=1e-5)
    assert len({round(value, 6) for values in scales.values() for value in values}) == 9  # nine different numbers


def test_the_corruption_matches_its_definition() -> None:
    masks = blocky(2, 9, 10, void=0.4)
    valid = masks != 255
    q = one_hot(masks, valid, C)
    p = corrupted(masks, valid, q)
    for image, ours_q, ours_p in zip(masks, q, p, strict=True):
        expected_q, expected_p = slow_corruption(image.tolist(), 255)
        np.testing.assert_array_equal(ours_q.numpy(), expected_q)
        np.testing.assert_allclose(ours_p.numpy(), expected_p, atol=1e-7)
    torch.testing.assert_close(p.sum(dim=1), valid.float())


def test_masks_of_one_class_give_scales_of_one() -> None:
    scales = measure_scales(random_proxy(), torch.full((2, 9, 9), 3))
    assert scales == dict.fromkeys(DISTANCES, (1.0, 1.0, 1.0))


def test_scales_look_at_the_first_32_masks() -> None:
    masks = blocky(40, 8, 8)
    proxy = random_proxy()
    assert measure_scales(proxy, masks) == measure_scales(proxy, masks[:32])
    assert measure_scales(proxy, masks[:32]) != measure_scales(proxy, masks[:31])


def test_scales_do_not_depend_on_the_scales_that_the_proxy_has() -> None:
    masks = blocky(2, 9, 9)
    scales = measure_scales(random_proxy(), masks)
    assert measure_scales(random_proxy(scales=scales, layer_weights=(0, 2, 1), distance="l2"), masks) == scales


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("void", [0.0, 0.3])
def test_each_layer_of_the_loss_is_one_for_the_standard_corruption(tap: str, distance: str, void: float) -> None:
    masks = blocky(4, 19, 23, void=void)
    proxy = random_proxy(tap, scales=measure_scales(random_proxy(tap), masks, ignore_index=255))
    valid = masks != 255
    damaged = corrupted(masks, valid, one_hot(masks, valid, C))
    result = semeda_loss(
        damaged,
        masks,
        proxy,
        ignore_index=255,
        from_logits=False,
        distance=distance,
        layer_weights=(0.5, 1, 2),
        backend="reference",
        return_components=True,
    )
    assert isinstance(result, LossComponents)
    torch.testing.assert_close(result.per_layer, torch.ones(3), rtol=0, atol=1e-5)
    assert float(result.semeda) == pytest.approx(3.5, abs=1e-4)


def test_measuring_leaves_the_proxy_and_the_masks_alone_and_builds_no_graph() -> None:
    proxy, masks = random_proxy(), blocky(2, 9, 9, void=0.2)
    before, kept = [tensor.clone() for tensor in proxy.buffers()], masks.clone()
    edge_quality(proxy, masks, ignore_index=255)
    measure_scales(proxy, masks, ignore_index=255)
    assert all(torch.equal(a, b) for a, b in zip(proxy.buffers(), before, strict=True))
    assert torch.equal(masks, kept)
    assert (proxy.scales, proxy.quality) == ({}, {})


def test_autocast_around_it_changes_no_measurement() -> None:
    proxy, masks = EdgeProxy.bundled(4), scenes(3)
    expected = edge_quality(proxy, masks), measure_scales(proxy, masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert (edge_quality(proxy, masks), measure_scales(proxy, masks)) == expected
