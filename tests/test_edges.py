"""edge_labels against a loop over pixels written from its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semeda_fast.proxy.edges import edge_labels

LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def slow_edges(target: Tensor, radius: int, ignore_index: int) -> Tensor:
    """True where a pixel within `radius` holds another valid label; Python integers, pixel by pixel."""
    rows = target.tolist()
    height, width = len(rows), len(rows[0])
    result = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            if rows[y][x] == ignore_index:
                continue
            for v in range(max(0, y - radius), min(height, y + radius + 1)):
                for u in range(max(0, x - radius), min(width, x + radius + 1)):
                    if rows[v][u] not in (ignore_index, rows[y][x]):
                        result[y, x] = True
    return result


def blocky(seed: int, n: int, h: int, w: int, labels: list[int], void: float, ignore_index: int) -> Tensor:
    """Labels in blocks of 5x5, so that edges and flat areas both occur, with void pixels sprinkled in."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(labels), (n, h // 5 + 1, w // 5 + 1), generator=generator)
    target = torch.tensor(labels)[pick].repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :h, :w].clone()
    target[torch.rand(target.shape, generator=generator) < void] = ignore_index
    return target


@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize(("void", "ignore_index"), [(0.0, -100), (0.3, -100), (0.3, 255), (0.6, 0)])
def test_matches_a_loop_over_pixels(radius: int, void: float, ignore_index: int) -> None:
    target = blocky(3, 2, 14, 17, [0, 1, 2, 7, 19], void, ignore_index)
    edges = edge_labels(target, radius=radius, ignore_index=ignore_index)
    expected = torch.stack([slow_edges(image, radius, ignore_index) for image in target])
    assert edges.dtype == torch.bool
    assert edges.shape == target.shape
    assert torch.equal(edges, expected)
    assert 0 < int(edges.sum()) < edges.numel()  # else this test shows nothing


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
def test_every_label_dtype_gives_the_same_edges(dtype: torch.dtype, ignore_index: int) -> None:
    representable = torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    target = blocky(4, 2, 11, 13, [0, 1, 3, 100], 0.2 if representable else 0.0, ignore_index)
    edges = edge_labels(target.to(dtype), ignore_index=ignore_index)
    assert torch.equal(edges, torch.stack([slow_edges(image, 1, ignore_index) for image in target]))


def test_bool_labels_are_two_classes() -> None:
    target = blocky(5, 1, 9, 9, [0, 1], 0.0, -100)
    assert torch.equal(edge_labels(target.bool()), edge_labels(target))


def test_uint8_label_156_is_a_class_although_minus_100_wraps_to_it() -> None:
    target = torch.full((1, 5, 5), 156, dtype=torch.uint8)
    target[:, :, 3:] = 7
    expected = torch.zeros(1, 5, 5, dtype=torch.bool)
    expected[:, :, 2:4] = True
    assert torch.equal(edge_labels(target, ignore_index=-100), expected)


def test_uint8_labels_up_to_255_are_told_apart() -> None:
    target = torch.tensor([[[255, 254, 254, 254, 0]]], dtype=torch.uint8)
    assert edge_labels(target).tolist() == [[[True, True, False, True, True]]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_large_labels_are_told_apart(dtype: torch.dtype) -> None:
    # 2^24 and 2^24 + 1 are one number in float32
    target = torch.tensor([[2**24, 2**24 + 1], [2**24, 2**24]], dtype=dtype)
    assert edge_labels(target).all()


def test_negative_labels_are_labels_unless_ignored() -> None:
    target = torch.tensor([[-3, -3, -7, -7, -7]])
    assert edge_labels(target).tolist() == [[False, True, True, False, False]]
    assert edge_labels(target, ignore_index=-7).tolist() == [[False] * 5]


def test_void_between_two_classes_hides_the_edge_up_to_the_radius() -> None:
    target = torch.tensor([[0, 0, 255, 1, 1]])
    assert edge_labels(target, ignore_index=255).tolist() == [[False] * 5]
    assert edge_labels(target, radius=2, ignore_index=255).tolist() == [[False, True, False, True, False]]


def test_the_border_of_the_image_is_no_edge_and_the_neighbourhood_is_a_square() -> None:
    target = torch.zeros(6, 7, dtype=torch.int64)
    assert not edge_labels(target, radius=3).any()
    target[0, 0] = 1
    for radius in (1, 2, 3):
        expected = torch.zeros(6, 7, dtype=torch.bool)
        expected[: radius + 1, : radius + 1] = True  # diagonal neighbours too
        assert torch.equal(edge_labels(target, radius=radius), expected)


def test_a_radius_above_the_image_size_sees_the_whole_image() -> None:
    assert edge_labels(torch.tensor([[0, 0, 1]]), radius=9).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (1, 9), (9, 1), (0, 4, 4)])
def test_tiny_shapes(shape: tuple[int, ...]) -> None:
    edges = edge_labels(torch.zeros(shape, dtype=torch.int64))
    assert edges.shape == shape
    assert edges.dtype == torch.bool
    assert not edges.any()


def test_all_void_has_no_edge() -> None:
    assert not edge_labels(torch.full((2, 4, 4), 255), ignore_index=255).any()


def test_one_image_equals_a_batch_of_one_and_images_do_not_leak() -> None:
    target = blocky(6, 3, 10, 8, [0, 1, 2], 0.1, -100)
    together = edge_labels(target, radius=2)
    for image, edges in zip(target, together, strict=True):
        assert torch.equal(edge_labels(image, radius=2), edges)
    two = torch.zeros(2, 4, 4, dtype=torch.int64)
    two[1] = 1
    assert not edge_labels(two).any()


def test_the_input_is_not_modified_and_may_have_any_strides() -> None:
    target = blocky(7, 2, 12, 9, [0, 1, 2], 0.2, 255)
    kept = target.clone()
    turned = edge_labels(target.transpose(1, 2), ignore_index=255)
    assert torch.equal(target, kept)
    assert torch.equal(turned.transpose(1, 2), edge_labels(target, ignore_index=255))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64], ids=str)
def test_labels_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"integer labels, got {dtype}"):
        edge_labels(torch.zeros(1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 4), ()])
def test_another_rank_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N,H,W\] or \[H,W\], got"):
        edge_labels(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("radius", [0, -1])
def test_a_radius_below_one_is_refused(radius: int) -> None:
    with pytest.raises(ValueError, match=f"radius must be at least 1 pixel, got {radius}"):
        edge_labels(torch.zeros(4, 4, dtype=torch.int64), radius=radius)
