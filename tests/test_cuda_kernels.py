"""The CUDA kernels' bodies in the emulation on what could tell them apart from a simple loop: tiles, seams, classes,
proxies, memory. Every number that comes out is compared with float64 (tests/cuda_oracle.py).

The guarantees of all backends, which run in this emulation too, are in the other files.
"""

from __future__ import annotations

import os
from dataclasses import replace

import cuda_machine
import pytest
import torch
from cuda_checks import (
    OUTPUT,
    SCENES,
    SMALL_TILES,
    STAGED,
    Oracle,
    Scene,
    decode_of,
    examine,
    examine_large_activations,
    problem_of,
)
from cuda_machine import DEVICES, forward_alone, get_number, last_launch, least_memory, machine, run
from helpers import VOID, assert_within_budget, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.backends import registry as backends

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get(cuda_machine.VARIABLE), reason="the emulated CUDA kernels are not built here"
    ),
]
needs_backend = pytest.mark.skipif(
    "cuda" not in backends.available_names("cpu"), reason="the emulation is not registered"
)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
WIDE, DEEP = ((32, 64), 64), ((16, 32, 32, 32, 32, 32), 16)
PROXIES = {"default": ((16, 32), 2), "four layers": ((16, 32, 32), 2), "wide": WIDE, "deep": DEEP}
ONLY_HALF = ("wide", "deep")


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_scenes_of_the_seeded_faults(scene: Scene) -> None:
    examine(scene)


def test_activations_above_the_largest_half_are_saturated() -> None:
    examine_large_activations()


def test_little_is_left_out_of_the_codes() -> None:
    """Signs that rounding may change are not compared; a check that leaves out most would see nothing."""
    for scene in (Scene(), Scene(tap="post"), Scene(widths=WIDE[0], edge_classes=64)):
        assert 0 < Oracle(problem_of(scene)).doubtful() < 0.03
    assert Oracle(problem_of(Scene(dtype=FULL))).doubtful() < 0.001


# Rows and widths of hidden regions that plan.cpp knows, all of them, where they fit into 227 KiB.
TILES = [
    *[(HALF, rows, 16) for rows in (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)],
    *[(BRAIN, 32, 32), (HALF, 14, 32), (HALF, 32, 48), (BRAIN, 6, 48), (HALF, 20, 64), (HALF, 16, 80), (BRAIN, 2, 80)],
    *[(FULL, 4, 16), (FULL, 32, 16), (FULL, 20, 32), (FULL, 14, 48), (FULL, 8, 64), (FULL, 6, 80)],
]


@pytest.mark.parametrize(("dtype", "rows", "width"), TILES, ids=str)
def test_tiles(dtype: torch.dtype, rows: int, width: int) -> None:
    numbers = {"tile_rows": rows, "tile_width": width}
    # A tile and a bit more in both directions, so that there are seams, and pixels beside the image.
    examine(Scene(h=rows + min(rows, 3), w=width + 1, dtype=dtype, machine=numbers), twice=rows % 4 == 0)
    assert (last_launch().rows, last_launch().width) == (rows, width)
    assert last_launch().tiles == 4


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("name", PROXIES)
def test_proxies(name: str, tap: str, dtype: torch.dtype) -> None:
    widths, edge_classes = PROXIES[name]
    scene = Scene(h=23, w=31, widths=widths, edge_classes=edge_classes, tap=tap, dtype=dtype)
    if dtype == FULL and name in ONLY_HALF:
        with pytest.raises(ValueError, match="float16 and bfloat16 logits alone"):
            examine(scene)
        return
    examine(scene, twice=dtype == HALF)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_on_many_small_tiles(name: str) -> None:
    widths, edge_classes = PROXIES[name]
    numbers = {"tile_rows": 8, "tile_width": 32 if name == "deep" else 16, "multiprocessors": 1}
    for labels, tap, classes in (("noise", "post", 30), ("stray", "pre", 4)):
        scene = Scene(20, 27, 1, classes, widths, edge_classes, True, tap, BRAIN, labels, machine=numbers)
        examine(scene, twice=False)
        assert last_launch().tiles > last_launch().blocks


SIZES = [(1, 1), (1, 2), (1, 33), (33, 1), (2, 3), (5, 5), (6, 7), (7, 7), (7, 12), (8, 11), (8, 12), (8, 13), (9, 12)]
SIZES += [(16, 24), (17, 25), (13, 23), (31, 37), (3, 67)]


@pytest.mark.parametrize(("h", "w"), SIZES, ids=str)
def test_sizes_around_a_tile_of_8_by_12(h: int, w: int) -> None:
    examine(Scene(h, w, n=1 + h % 2, labels="noise", machine=SMALL_TILES), twice=False)
    examine(Scene(h, w, dtype=FULL, tap="post", machine=SMALL_TILES), twice=False)


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("classes", [2, 7, 8, 9, 16, 17, 23, 24, 25, 48, 49, 150, 256])
def test_classes(classes: int, dtype: torch.dtype) -> None:
    examine(Scene(14, 21, classes=classes, dtype=dtype, labels="noise", smoothing=0.1 * (classes % 2)), twice=False)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_binary(dtype: torch.dtype) -> None:
    scene = Scene(19, 30, n=2, classes=2, binary=True, dtype=dtype, machine=SMALL_TILES)
    examine(scene)
    examine(replace(scene, tap="post", smoothing=0.2, weighted=True, masked=True), twice=False)


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("labels", ["uniform", "edge", "stray", "void", "frame", "hole", "noise"])
def test_labels(labels: str, tap: str) -> None:
    examine(Scene(31, 43, labels=labels, tap=tap, machine=SMALL_TILES), twice=False)
    examine(Scene(31, 43, labels=labels, tap=tap, dtype=FULL, classes=30, weighted=True), twice=False)


@needs_backend
@pytest.mark.parametrize("tap", ["pre", "post"])
def test_features_of_exactly_zero(tap: str) -> None:
    """Where only void is in reach of a network without biases t(p) is 0, which no gradient passes, however coded."""
    given = make_proxy(tap=tap)
    zeros = [torch.zeros_like(bias) for bias in given.biases]
    proxy = EdgeProxy.from_tensors(given.layers, given.weights, zeros, tap=tap, distance="l1")
    logits, target = make_inputs(h=31, w=43)
    target[:, 8:25, 9:30] = VOID
    with machine(**SMALL_TILES):
        examine(Scene(bias=False, tap=tap, labels="frame"), twice=False)
        for dtype in (FULL, BRAIN):
            assert_within_budget(logits.detach().to(dtype), target, proxy, "cuda", ignore_index=VOID)


# In tiles of 12 and of 44 columns; units of 16 pixels join in the latter.
EDGES = [*((38, 16, edge) for edge in range(0, 38, 3)), *((100, 48, edge) for edge in range(54, 68, 2))]


@pytest.mark.parametrize(("w", "width", "edge"), EDGES, ids=str)
def test_a_class_edge_at_every_place_of_a_tile(w: int, width: int, edge: int) -> None:
    """Known and computed target features have to join without a seam; a fault shows where units change."""
    scene = Scene(26, w, classes=3, tap="post", machine={**SMALL_TILES, "tile_width": width})
    problem = problem_of(scene)
    across = (torch.arange(w) >= edge).expand(1, 26, w)
    down = (torch.arange(26) >= edge * 26 // w)[:, None].expand(1, 26, w)
    for border in (across, down):
        examine(scene, twice=False, problem=problem._replace(target=border.to(torch.uint8)))


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name: str) -> None:
    """Each has its own share of shared memory, so its own tiles; where little fits, weights are copied each time."""
    numbers = DEVICES[name]
    resident = []
    for scene in (
        Scene(40, 90),
        Scene(40, 90, dtype=FULL),
        Scene(21, 33, classes=150, dtype=FULL),
        *halves(WIDE, DEEP),
    ):
        with machine(**numbers):
            if name == "sm_86" and scene.edge_classes > 2:
                with pytest.raises(ValueError, match=r"more shared memory .* \(101376 bytes\)"):
                    examine(scene)
                continue
            examine(scene, twice=False)
            resident.append(last_launch().resident)
    assert 1 in resident


def halves(*proxies: tuple[tuple[int, ...], int]) -> list[Scene]:
    return [Scene(19, 35, widths=widths, edge_classes=last) for widths, last in proxies]


@pytest.mark.parametrize("scene", [Scene(), Scene(dtype=FULL), *halves(WIDE)], ids=str)
def test_weights_that_do_not_stay(scene: Scene) -> None:
    """The same tile with weights that stay and with those that are copied for each layer: the same bits."""
    problem = problem_of(scene)
    with machine(**SMALL_TILES, **DEVICES["sm_90"]):
        stay = run(problem)
        assert last_launch().resident
        with least_memory(problem):
            copied = run(problem)
            assert not last_launch().resident
    copied.assert_same(stay, "copied weights")


def test_many_classes_leave_in_strips() -> None:
    """Of a few rows of the tile each, as many as fit into shared memory; the last strip is cut short."""
    for classes, rows, strip in ((50, 20, 6), (20, 28, 24), (150, 16, 2)):
        scene = Scene(rows + 5, 40, classes=classes, machine={"tile_rows": rows, "tile_width": 32})
        examine(scene, twice=False)
        assert last_launch().strip_rows == strip, "the plan has changed: take tiles whose last strip is shorter"


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_the_number_of_multiprocessors_changes_nothing(dtype: torch.dtype) -> None:
    """Blocks take turns at tiles, and sums are added in the order of tiles: the same bits."""
    problem = problem_of(Scene(33, 50, n=2, dtype=dtype))
    results = []
    for count in (1, 3, 100):
        with machine(**{**SMALL_TILES, "multiprocessors": count}):
            results.append(run(problem))
            assert last_launch().tiles == 50
            assert last_launch().blocks == min(50, count * (2 if dtype == HALF else 1))
    results[1].assert_same(results[0], "3 multiprocessors instead of 1")
    results[2].assert_same(results[0], "100 multiprocessors instead of 1")


def test_forward_alone_is_the_same() -> None:
    """Without a gradient to come no codes are written; the sums stay."""
    problem = problem_of(Scene(classes=20))
    with_codes = run(problem)
    terms, counts = forward_alone(problem)
    assert torch.equal(terms.view(torch.int32), with_codes.terms.view(torch.int32))
    assert torch.equal(counts, with_codes.counts)


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_known_target_features_save_products(dtype: torch.dtype) -> None:
    def products(labels: str) -> int:
        before = get_number("products")
        run(problem_of(Scene(48, 60, labels=labels, tap="post", dtype=dtype, machine=SMALL_TILES)))
        return get_number("products") - before

    with machine(**SMALL_TILES):
        uniform, stray, noise = products("uniform"), products("stray"), products("noise")
    assert uniform < stray < noise


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("tap", ["pre", "post"])
def test_known_and_computed_target_features_agree(tap: str, dtype: torch.dtype) -> None:
    """A stray label makes its surroundings compute what they know elsewhere; beyond its reach nothing changes."""
    scene = Scene(41, 61, labels="uniform", tap=tap, dtype=dtype, machine={"tile_rows": 12, "tile_width": 32})
    uniform, stray = problem_of(scene), problem_of(replace(scene, labels="stray"))
    found = []
    with machine(**scene.machine):
        for problem in (uniform, stray):
            result = run(problem)
            found.append((decode_of(problem, result), result.d_logits))
    (codes, gradient), (codes_stray, gradient_stray) = found
    y, x = torch.arange(41)[:, None], torch.arange(61)[None, :]
    far = torch.maximum((y - 20).abs(), (x - 30).abs())
    sure = Oracle(uniform).layers
    for number, (one, two) in enumerate(zip(codes, codes_stray, strict=True)):
        beyond = far > number + 1
        for a, b in zip(one[1:], two[1:], strict=True):
            differs = (a != b) & beyond & (sure[number].positive_sure if tap == "post" else True)
            assert not bool((differs & (sure[number].distance.abs() > 4 * sure[number].distance_error)).any())
    beyond = far > 7  # the features' reach and the gradient's
    difference = (gradient - gradient_stray).double()[:, :, beyond].norm()
    assert difference <= (1e-5 if dtype == FULL else 1e-2) * gradient.double()[:, :, beyond].norm()


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_backward_is_linear_in_both_gradients(dtype: torch.dtype) -> None:
    problem = problem_of(Scene(19, 26, dtype=dtype, smoothing=0.1, weighted=True))

    def gradient(d_ce: float, d_semeda: float) -> Tensor:
        return run(problem, d_ce=d_ce, d_semeda=d_semeda).d_logits.double()

    ce, semeda = gradient(1, 0), gradient(0, 1)
    assert bool(ce.any())
    assert bool(semeda.any())
    if dtype == FULL:  # powers of two are exact, where no subnormal number is in the way
        assert torch.equal(gradient(4, 0), 4 * ce)
        assert torch.equal(gradient(0, -2), -2 * semeda)
    assert not bool(gradient(0, 0).any())
    mixed = 0.3 * ce - 1.7 * semeda
    size = 0.3 * ce.abs() + 1.7 * semeda.abs()
    assert bool(((gradient(0.3, -1.7) - mixed).abs() <= 2 * OUTPUT[dtype] * size + 2.0**-20 * size.max()).all())


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "columns first", "repeated"])
def test_layouts(layout: str) -> None:
    """Logits and their gradient at any strides; what lies between their elements is neither read nor written."""
    scene = Scene(19, 26, n=2, dtype=HALF, channels_last=layout == "channels_last")
    problem = problem_of(scene)
    z = problem.logits
    if layout == "sliced":
        whole = torch.full((3, 7, 22, 60), torch.nan, dtype=z.dtype)
        z = whole[1:, 1:6, 2:21, 3:55:2].copy_(z)
    elif layout == "columns first":
        z = z.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "repeated":
        z = z[:1].expand(2, -1, -1, -1)
        target = problem.target[:1].expand(2, -1, -1)
        result = run(problem._replace(logits=z.contiguous(), target=target.contiguous()))
        shared = forward_alone(problem._replace(logits=z, target=target))
        assert torch.equal(result.terms, shared[0])
        return
    expected = run(problem._replace(logits=z.contiguous()))
    result = run(problem._replace(logits=z))
    assert result.d_logits.stride() == z.stride() or layout == "sliced"
    assert torch.equal(result.terms, expected.terms)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.d_logits, expected.d_logits)


def test_a_bad_label_is_counted_and_makes_a_nan() -> None:
    problem = problem_of(Scene(labels="noise"))
    target = problem.target.to(torch.int16)
    target[0, 3, 4], target[0, 20, 36], target[0, 0, 0] = 5, -1, 32767
    result = run(problem._replace(target=target))
    assert result.counts.tolist() == [int((target != VOID).sum()), 3]
    assert bool(result.terms[:2].isnan().all())


@pytest.mark.parametrize("classes", [5, 30])
def test_nan_under_void_reaches_nothing(classes: int) -> None:
    problem = problem_of(Scene(classes=classes, masked=True))
    void = ~Oracle(problem).v
    z = problem.logits.clone()
    z.permute(0, 2, 3, 1)[void] = torch.nan
    run(problem._replace(logits=z)).assert_same(run(problem), "NaN at void pixels")


@pytest.mark.parametrize("classes", [5, 30])
def test_nan_at_a_valid_pixel_is_no_result(classes: int) -> None:
    problem = problem_of(Scene(classes=classes, labels="uniform"))
    z = problem.logits.clone()
    z[0, 2, 20, 36] = torch.nan
    result = run(problem._replace(logits=z))
    assert bool(result.terms[:2].isnan().all())
    assert bool(result.d_logits[0, :, 20, 36].isnan().all())
    assert not bool(result.d_logits[0, :, 0, 0].isnan().any())


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    problem = problem_of(Scene(dtype=dtype))
    largest = min(torch.finfo(dtype).max, 1e30)
    result = run(problem._replace(logits=(problem.logits.sign() * largest)))
    assert bool(result.terms.isfinite().all())
    assert bool(result.d_logits.isfinite().all())


def test_integers_of_every_width() -> None:
    problem = problem_of(Scene(labels="noise", classes=20))
    expected = run(problem)
    for dtype in (torch.int16, torch.uint16, torch.int32, torch.int64):
        run(problem._replace(target=problem.target.to(dtype))).assert_same(expected, f"labels of {dtype}")
    signed = problem._replace(target=torch.where(problem.target == VOID, 100, problem.target).to(torch.int8))
    config = replace(problem.config, ignore_index=100)
    run(signed._replace(config=config)).assert_same(expected, "labels of int8")


BUDGETS = [
    (HALF, "default", {"tile_rows": 12, "tile_width": 48}),
    (BRAIN, "four layers", SMALL_TILES),
    (FULL, "default", STAGED),
    (FULL, "four layers", {"tile_rows": 6, "tile_width": 32}),
    (HALF, "deep", {"tile_rows": 8, "tile_width": 32}),
    (BRAIN, "wide", {"tile_rows": 10, "tile_width": 16}),
]


@needs_backend
@pytest.mark.parametrize(("dtype", "name", "numbers"), BUDGETS, ids=str)
def test_the_loss_keeps_the_error_budget_on_other_tiles(dtype: torch.dtype, name: str, numbers: dict[str, int]) -> None:
    widths, edge_classes = PROXIES[name]
    logits, target = make_inputs(h=29, w=41, dtype=dtype)
    with machine(**numbers):
        assert_within_budget(
            logits, target, make_proxy(widths=widths, edge_classes=edge_classes), "cuda", ignore_index=VOID
        )


@needs_backend
@pytest.mark.parametrize(("classes", "size"), [(21, 65), (150, 33), (256, 33)])
def test_an_fp32_loss_does_not_shrink_with_the_number_of_products(classes: int, size: int) -> None:
    """Tensor cores cut sums off toward zero: in one sum of all products each |d| would lose some 1e-6 of itself."""
    logits, target = make_inputs(1, classes, size, size)
    sharp = (3 * logits.detach()).requires_grad_()
    proxy = EdgeProxy.bundled(classes)

    def loss(backend: str, x: Tensor) -> float:
        criterion = SemedaLoss(proxy, lambda_ce=0.0, lambda_semeda=1.0, ignore_index=VOID, backend=backend)
        return float(criterion(x, target).detach())

    exact = loss("reference", sharp.double())
    assert abs(loss("cuda", sharp) - exact) <= 5e-7 * exact
