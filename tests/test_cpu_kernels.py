"""The fused CPU kernels on every instruction set of this processor: shapes at their seams, proxies, inputs.

Everything is compared with the reference in float64 by the error budget (tests/cpu_budget.py). The guarantees of
all backends, which run on this one too, are in the other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cpu_budget import Judge, loss_and_grad
from helpers import VOID, components, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy, semeda_loss
from semeda_fast.backends import cpu
from semeda_fast.backends import registry as backends
from semeda_fast.backends.native import native_info, native_module
from semeda_fast.proxy.record import ProxyLayer

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)
TAPS = ("pre", "post")
DISTANCES = ("l1", "l2", "smooth_l1")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The instruction set and the number of threads are of the process: what a test chose must not stay."""
    module, threads = native_module(), torch.get_num_threads()
    name = module.instruction_set()
    yield
    assert module.use_instruction_set(name)
    torch.set_num_threads(threads)


def instruction_sets() -> list[str]:
    """Those built that this processor has; the caller finds the last of them in use."""
    module = native_module()
    return [name for name in module.build_info()["instruction_sets"] if module.use_instruction_set(name)]


def check(logits: Tensor, target: Tensor, proxy: EdgeProxy, **options: Any) -> None:
    """Value and gradient of every instruction set within the budget; the same loss without a gradient."""
    judge = Judge(logits, target, proxy, **options)
    for name in instruction_sets():
        assert native_module().use_instruction_set(name)
        ours = loss_and_grad(logits, target, proxy, "cpu", **options)
        judge.check(ours, name)
        with torch.no_grad():
            alone = components(logits, target, proxy, backend="cpu", **options).loss
        torch.testing.assert_close(alone, ours.loss, rtol=0, atol=0, equal_nan=True, msg=f"{name}: no_grad changes it")


def proxy_of(classes: int, layers: Sequence[tuple[int, int]], **options: Any) -> EdgeProxy:
    """A proxy of random weights; layers are (channels, kernel size)."""
    generator = torch.Generator().manual_seed(3)
    ins = [classes, *(out for out, _ in layers)]
    shapes = [ProxyLayer(a, out, size) for a, (out, size) in zip(ins, layers, strict=False)]
    weights, biases = [], []
    for number, s in enumerate(shapes):
        size = (s.out_channels, s.in_channels, s.kernel_size, s.kernel_size)
        fan_in = s.kernel_size**2 * (s.in_channels if number else 1)
        weights.append(torch.randn(size, generator=generator) * (2 / fan_in) ** 0.5)
        biases.append(0.1 * torch.randn(s.out_channels, generator=generator))
    return EdgeProxy.from_tensors(shapes, weights, biases, **options)


def test_the_instruction_sets_are_those_of_the_processor() -> None:
    module, found = native_module(), native_info().cpu
    built = module.build_info()["instruction_sets"]
    best = module.instruction_set()
    needs = {"avx512": ("avx512f", "avx512bw", "avx512vl", "fma", "f16c"), "avx2": ("avx2", "fma", "f16c")}
    needs |= {"neon": ("neon",)}
    expected = [name for name in built if all(found[flag] for flag in needs.get(name, ()))]
    assert built[-1] == "portable"
    assert best == expected[0]
    assert instruction_sets() == expected
    for name in expected:
        assert module.use_instruction_set(name)
        assert module.instruction_set() == name
    assert not module.use_instruction_set("mmx")
    assert module.instruction_set() == expected[-1]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("tap", TAPS)
def test_every_form_of_the_loss(tap: str, distance: str, reduction: str) -> None:
    logits, target = make_inputs(h=19, w=37)
    check(
        logits,
        target,
        make_proxy(tap=tap, distance=distance, layer_weights=(0.5, 2.0, 1.5)),
        ignore_index=VOID,
        reduction=reduction,
        lambda_ce=0.7,
        lambda_semeda=1.3,
        weight=torch.tensor([0.3, 1.0, 2.0, 0.0, 0.7]),
        label_smoothing=0.1,
    )


# One pixel, one row, one column, under and over a unit of 16 columns, over a tile of 48 or 96 columns, several
# chunks of rows (the largest has 64), several strips of columns (above 2048, or where many classes leave no room).
SHAPES = [
    (1, 3, 1, 1),
    (2, 3, 1, 7),
    (1, 3, 1, 33),
    (2, 3, 9, 1),
    (1, 2, 5, 3),
    (1, 3, 4, 15),
    (1, 3, 7, 16),
    (1, 3, 6, 17),
    (1, 4, 13, 31),
    (1, 3, 3, 49),
    (1, 3, 3, 97),
    (1, 2, 5, 113),
    (1, 3, 67, 5),
    (3, 2, 35, 3),
    (1, 5, 37, 41),
    (1, 3, 131, 19),
    (1, 2, 3, 2100),
    (1, 2, 37, 2070),
    (1, 256, 6, 139),
    (1, 1024, 2, 420),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_at_the_seams(shape: tuple[int, int, int, int]) -> None:
    n, c, h, w = shape
    logits, target = make_inputs(n=n, c=c, h=h, w=w, void=0.05, num_labels=min(c, 255))
    large = n * c * h * w > 20000
    for number, (tap, distance) in enumerate((tap, distance) for tap in TAPS for distance in DISTANCES):
        if large and number % 2:
            continue
        proxy = proxy_of(c, [(4, 3), (5, 3), (2, 3)] if large else [(16, 3), (32, 3), (2, 3)], tap=tap)
        check(logits, target, proxy, distance=distance, ignore_index=VOID, lambda_semeda=1.0)


@pytest.mark.parametrize("edge", [15, 16, 17, 64, 65, 80, 128, 144, 1056, 2048])
def test_label_edges_at_every_place_of_a_strip(edge: int) -> None:
    """Two classes meet at column `edge`: elided and computed targets have to join there without a seam."""
    width = min(edge + 40, 2090)
    logits, _ = make_inputs(n=1, c=2, h=12, w=width, void=0.0)
    target = (torch.arange(width) >= edge).long().expand(1, 12, width)
    check(logits, target, proxy_of(2, [(4, 3), (3, 5), (2, 3)]), lambda_semeda=1.0)


@pytest.mark.parametrize("row", [1, 3, 4, 15, 16, 17, 31, 32, 33, 47])
def test_label_edges_at_every_place_of_a_chunk(row: int) -> None:
    logits, _ = make_inputs(n=1, c=2, h=50, w=33, void=0.0)
    target = (torch.arange(50) >= row).long().reshape(1, 50, 1).expand(1, 50, 33)
    check(logits, target, proxy_of(2, [(4, 3), (3, 5), (2, 3)]), lambda_semeda=1.0)


LAYERS = [
    [(1, 1), (1, 1)],
    [(1, 3), (1, 3)],
    [(3, 5), (2, 5)],
    [(4, 7), (3, 7)],
    [(17, 3), (3, 7), (2, 1)],
    [(64, 3), (64, 3), (2, 3)],
    [(3, 5), (64, 1), (17, 5)],
    [(5, 1), (6, 3), (7, 5), (8, 7)],
    [(8, 3)] * 5,
    [(2, 3), (9, 1), (10, 3), (11, 5), (3, 3), (12, 3)],
    [(4, 3)] * 7,
    [(16, 3), (8, 1), (4, 5), (8, 3), (5, 3), (16, 7), (3, 3), (64, 3)],
]


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: "-".join(f"{out}k{k}" for out, k in layers))
def test_proxies(layers: list[tuple[int, int]], tap: str) -> None:
    logits, target = make_inputs(n=1, c=4, h=21, w=23, void=0.05)
    for distance in DISTANCES:
        check(logits, target, proxy_of(4, layers, tap=tap), distance=distance, ignore_index=VOID, lambda_semeda=1.0)


@pytest.mark.parametrize("width", [*range(1, 18), 24, 31, 32, 33, 47, 48, 49, 63, 64])
def test_widths(width: int) -> None:
    """Blocks of output channels of every size that the registers hold, and what is left of them."""
    logits, target = make_inputs(n=1, c=3, h=6, w=19, void=0.05)
    check(logits, target, proxy_of(3, [(width, 3), (2, 1)]), ignore_index=VOID, lambda_semeda=1.0)
    check(logits, target, proxy_of(3, [(2, 5), (width, 3)]), ignore_index=VOID, lambda_semeda=1.0)


@pytest.mark.parametrize("classes", [1, 2, 4, 7, 15, 16, 17, 33, 63, 64, 65, 150, 255, 256, 257, 1024])
def test_classes(classes: int) -> None:
    logits, target = make_inputs(n=1, c=classes, h=7, w=18, void=0.0, num_labels=max(classes, 2))
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = -100
    mode = "binary" if classes == 1 else "multiclass"
    check(logits, target, proxy_of(max(classes, 2), [(4, 3), (2, 3)]), lambda_semeda=1.0, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tap", TAPS)
def test_soft_targets(dtype: torch.dtype, tap: str) -> None:
    """A target of its own dtype and layout, with a mask; unchecked, it need not sum to one."""
    logits, labels = make_inputs(h=21, w=18)
    q = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    q = q.contiguous(memory_format=torch.channels_last)
    options = {"valid_mask": labels != VOID, "weight": torch.rand(5) + 0.1, "label_smoothing": 0.2}
    options["validate"] = "never"
    for distance in DISTANCES:
        check(logits, q, make_proxy(tap=tap), distance=distance, lambda_semeda=1.0, **options)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 2100])  # 2100: strips of columns, whose halos overlap
@pytest.mark.parametrize("share", [torch.nan, -0.02, 0.94, 1.06, 255.0])
def test_pixels_without_a_distribution(width: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is marked, in every instruction set, and no other; void ones are not."""
    classes, height = 5, 9
    proxy = make_proxy(classes)
    generator = torch.Generator().manual_seed(width)
    target = torch.rand(2, classes, height, width, generator=generator)
    target /= target.sum(dim=1, keepdim=True)
    wrong = torch.rand(2, height, width, generator=generator) < 0.3
    wrong[1, -1, -1] = True
    target[:, :3][wrong.unsqueeze(1).expand(-1, 3, -1, -1)] = 0.0
    target[:, 3][wrong] = 1 - share if share < 0 else 0.0
    target[:, 4][wrong] = share
    valid = torch.rand(2, height, width, generator=generator) < 0.7
    valid[1, -1, -1] = True
    logits = torch.randn(target.shape, generator=generator)
    options: dict[str, Any] = {"valid_mask": valid, "backend": "cpu", "reduction": "none"}
    for name in instruction_sets():
        assert native_module().use_instruction_set(name)
        with pytest.raises(ValueError, match=f"{int((wrong & valid).sum())} of {int(valid.sum())} do not"):
            semeda_loss(logits, target, proxy, **options)
        assert torch.isfinite(semeda_loss(logits, target, proxy, **{**options, "valid_mask": valid & ~wrong})).all()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "name_bad_labels", lambda problem: None)
            marked = components(logits, target, proxy, **options).ce.isnan()
        assert torch.equal(marked, wrong & valid)


@pytest.mark.parametrize("channels", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_binary_mode(channels: int, dtype: torch.dtype) -> None:
    """Labels (0), a soft target of one channel, and of both."""
    logits, target = make_inputs(c=1, num_labels=2, h=19, w=21, dtype=dtype)
    if channels == 0:
        options: dict[str, Any] = {"ignore_index": VOID}
    else:
        options = {"valid_mask": target != VOID}
        target = torch.rand(2, 1, 19, 21, generator=torch.Generator().manual_seed(3))
        if channels == 2:
            target = torch.cat([1 - target, target], dim=1)
    proxy = proxy_of(2, [(16, 3), (2, 3)])
    check(logits, target, proxy, mode="binary", label_smoothing=0.1, weight=torch.tensor([0.5, 2.0]), **options)


@pytest.mark.parametrize(
    "labels", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]
)
@pytest.mark.parametrize("masked", [False, True])
def test_label_dtypes(labels: torch.dtype, masked: bool) -> None:
    """With a mask, what lies under it may be any number that the dtype holds."""
    logits, target = make_inputs(c=2, h=18, w=19, void=0.0)
    options: dict[str, Any] = {"ignore_index": 1 if labels == torch.bool and not masked else -1}
    narrow = target.to(labels)
    if labels.is_signed:
        narrow[:, ::3, ::2] = -1
    if masked:
        options["valid_mask"] = torch.rand(target.shape, generator=torch.Generator().manual_seed(4)) < 0.8
        if labels != torch.bool:
            hidden = torch.where(options["valid_mask"], narrow.to(torch.int64), torch.iinfo(labels).max)
            narrow = hidden.to(labels)
    check(logits, narrow, proxy_of(2, [(4, 3), (2, 3)]), lambda_semeda=1.0, **options)


LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over rows": lambda x: x[:, :, :1].expand_as(x),
    "expanded over columns": lambda x: x[..., :1].expand_as(x),
    "expanded over classes": lambda x: x[:, :1].expand_as(x),
    "every third column": lambda x: x.repeat_interleave(3, dim=3)[..., ::3],
    "columns first": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    logits, target = make_inputs(h=9, w=35, dtype=dtype)
    strided = LAYOUTS[layout](logits.detach())
    before = strided.clone()
    check(strided, LAYOUTS[layout](target.unsqueeze(1))[:, 0], make_proxy(), ignore_index=VOID, lambda_semeda=1.0)
    assert torch.equal(strided, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 21, 31, 32, 33, 48, 150])
def test_channels_last_changes_no_bit(classes: int, dtype: torch.dtype) -> None:
    logits, target = make_inputs(2, classes, 5, 53, dtype=dtype)
    logits = logits.detach()
    logits[0, 1, 2, 3], logits[1, 0, 4, 40] = float("nan"), float("inf")  # and their gradients, NaN
    proxy = proxy_of(classes, [(8, 3), (2, 3)])
    # Channels together, and nothing else dense: each pixel lies in wider memory.
    padded = torch.empty(2, 5, 53, classes + 3, dtype=dtype)[..., :classes].permute(0, 3, 1, 2).copy_(logits)
    for name in instruction_sets():
        native_module().use_instruction_set(name)
        planar = loss_and_grad(logits, target, proxy, "cpu", ignore_index=VOID)
        for other in (logits.contiguous(memory_format=torch.channels_last), padded):
            last = loss_and_grad(other, target, proxy, "cpu", ignore_index=VOID)
            for a, b in ((planar.loss, last.loss), (planar.grad, last.grad)):
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {other.stride()}")


def test_infinite_logits() -> None:
    """Classes switched off by -inf count as probability 0; a target among them makes the loss infinite."""
    logits, target = make_inputs(h=8, w=21, void=0.0)
    off = logits.detach().clone()
    off[:, 4] = -torch.inf
    check(off, target.clamp(max=3), make_proxy())
    check(off, torch.full_like(target, 4), make_proxy())
    check(logits.detach().masked_fill(target.unsqueeze(1) == 0, torch.inf), target, make_proxy())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_under_void_gets_anywhere(poison: float, dtype: torch.dtype) -> None:
    """At every place of a row and on every instruction set, bit for bit."""
    logits, target = make_inputs(h=37, w=37, void=0.4, dtype=dtype)
    poisoned = logits.detach().masked_fill((target == VOID).unsqueeze(1), poison)
    for name in instruction_sets():
        native_module().use_instruction_set(name)
        clean = loss_and_grad(logits, target, make_proxy(), "cpu", ignore_index=VOID, reduction="none")
        dirty = loss_and_grad(poisoned, target, make_proxy(), "cpu", ignore_index=VOID, reduction="none")
        assert torch.equal(clean.loss, dirty.loss), name
        assert torch.equal(clean.grad, dirty.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits(dtype: torch.dtype) -> None:
    logits, target = make_inputs(h=12, w=21, dtype=dtype)
    huge = (5000 * logits.detach()).clamp(-1e4, 1e4)
    assert float(huge.max()) > 9e3
    for distance in DISTANCES:
        check(huge, target, make_proxy(), distance=distance, ignore_index=VOID, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_perfect_prediction_costs_nothing(tap: str, distance: str, dtype: torch.dtype) -> None:
    """Saturated one-hot logits: the SEMEDA term is exactly 0, and so is every gradient."""
    _, target = make_inputs(h=37, w=41, void=0.1)
    labels = target.where(target != VOID, 0).unsqueeze(1)
    logits = torch.zeros(2, 5, 37, 41).scatter_(1, labels, 1e4).to(dtype).requires_grad_()
    for name in instruction_sets():
        native_module().use_instruction_set(name)
        for layers in ([(16, 3), (32, 3), (2, 3)], [(3, 5), (4, 1), (2, 7)]):
            proxy = proxy_of(5, layers, tap=tap)
            result = components(logits, target, proxy, backend="cpu", distance=distance, ignore_index=VOID)
            assert result.semeda == 0, name
            assert not result.per_layer.any(), name
            (grad,) = torch.autograd.grad(result.loss, logits)
            assert not grad.any(), name


UPSTREAM = {
    "contiguous": lambda u: u,
    "transposed": lambda u: u.transpose(1, 2).contiguous().transpose(1, 2),
    "a scalar, expanded": lambda u: torch.full((), 0.3).expand_as(u),
    "a row, expanded": lambda u: u[:, :1].expand_as(u),
    "a column, expanded": lambda u: u[:, :, :1].expand_as(u),
    "zero but for one pixel": lambda u: torch.zeros_like(u).index_put_(
        (torch.tensor(1), torch.tensor(18), torch.tensor(16)), torch.tensor(1.0)
    ),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("tap", TAPS)
def test_upstream_gradients_of_a_map(upstream: str, tap: str) -> None:
    """l2 has no jumps but the ReLU's, so that whole gradients can be compared with the oracle's."""
    logits, target = make_inputs(h=19, w=33)
    up = UPSTREAM[upstream](torch.rand(2, 19, 33, generator=torch.Generator().manual_seed(5)))
    proxy = make_proxy(tap=tap, distance="l2")

    def grad(x: Tensor, backend: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        options = {"ignore_index": VOID, "reduction": "none", "lambda_semeda": 1.0}
        loss = components(leaf, target, proxy, backend=backend, **options).loss
        return torch.autograd.grad(loss, leaf, up.to(loss.dtype))[0]

    oracle, reference = grad(logits.double(), "reference"), grad(logits, "reference")
    budget = 2 * (reference - oracle).norm() + 1e-6 * oracle.norm()
    for name in instruction_sets():
        native_module().use_instruction_set(name)
        assert (grad(logits, "cpu") - oracle).norm() <= budget, name


def test_an_expanded_scalar_as_upstream_gradient() -> None:
    """What `loss.expand(3).sum()` and a scaled loss send back."""
    logits, target = make_inputs()
    for make in (lambda x: x.expand(3).sum(), lambda x: 1024 * x, lambda x: x - x):
        x = logits.detach().requires_grad_()
        loss = semeda_loss(x, target, make_proxy(), backend="cpu", ignore_index=VOID)
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (grad,) = torch.autograd.grad(make(loss), x)
        factor = float(torch.autograd.grad(make(s := torch.ones((), requires_grad=True)), s)[0])
        assert (grad - factor * once).norm() <= 1e-6 * (factor * once).norm()
