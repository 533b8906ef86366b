"""Checks of each Triton kernel alone against PyTorch in float64; `test_triton_faults.py` runs them.

A check fills what the kernel reads and looks at what it writes. It takes the package that holds the kernels, so that
it can look at a faulty copy, too. Formula numbers are those of kernels/README.md.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from test_triton_kernels import make_config, run_guarded
from torch import Tensor

C, VOID = 5, 255
CHANNELS = (C, 16, 48, 2)  # 48: two words of codes a pixel


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def rows(planar: Tensor, width: int) -> Tensor:
    """[N,K,H,W] -> [P, width], zero beyond K."""
    flat = planar.movedim(1, 3).reshape(-1, planar.shape[1])
    return F.pad(flat, (0, width - planar.shape[1])).float()


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel failed to write must not pass because an earlier test left it there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Bench:
    """All launches of one loss, with their buffers, none of which has run."""

    def __init__(
        self,
        kernels: ModuleType,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        *,
        distribution: Tensor | None = None,  # the target, [N,C,H,W], in the place of labels
        **options: Any,
    ) -> None:
        self.n, self.h, self.w = n, h, w = shape
        config = make_config(channels=CHANNELS, ignore_index=VOID, layer_weights=(1.0, 0.5, 3.0), **options)
        self.plan = importlib.import_module(f"{kernels.__name__}.plan").make_plan(
            config, shape, dtype, distribution is not None
        )
        launch = importlib.import_module(f"{kernels.__name__}.launch")
        self.target = torch.randint(0, C, (n, h, w), generator=torch.Generator().manual_seed(1))
        self.target[uniform(n, h, w) < 0.2] = VOID
        target = self.target if distribution is None else distribution
        valid = None if distribution is None else self.valid
        self.weights = [randn(k, c, 3, 3, seed=10 + c) / (9 * c) ** 0.5 for c, k in itertools.pairwise(CHANNELS)]
        self.biases = [0.3 * randn(k, seed=20 + k) for k in CHANNELS[1:]]
        flat = torch.cat([tensor.reshape(-1) for tensor in (*self.weights, *self.biases)])
        self.class_weight = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
        # Every other column: strides that no default gets right. exp(200) is infinite, and exp(0) hides exp(-200).
        offset = torch.tensor([200.0, -200.0])[torch.arange(h) % 2][:, None]
        self.logits = (offset + 2 * randn(n, C, h, 2 * w))[:, :, :, ::2]
        self.inputs = launch.Inputs(self.logits, target, valid, self.class_weight, flat)
        self.scales = torch.tensor([0.7]), torch.tensor([1.3])
        with filled_memory():
            codes = torch.empty(self.plan.code_offsets[-1], dtype=torch.uint8)
            saved = torch.empty(0)
            outputs = {
                "terms": torch.empty(3 + 3),
                "counts": torch.empty(2, dtype=torch.int64),
                "codes": codes,
                "saved": saved,
                "ce_map": None,
                "semeda_map": None,
            }
            self.d_logits = torch.empty(n, C, h, w)
            self.forward = list(launch.forward_launches(self.plan, self.inputs, outputs, "ieee"))
            gradients = (codes, saved, *self.scales, self.d_logits)
            self.backward = list(launch.backward_launches(self.plan, self.inputs, *gradients, "ieee"))

    def launches(self, kernel: str, backward: bool = False) -> list[Any]:
        """Those of one kernel, in the order of the layers."""
        found = [x for x in (self.backward if backward else self.forward) if x.kernel.__name__ == kernel]
        return found[::-1] if kernel == "layer_bwd_kernel" else found

    @property
    def valid(self) -> Tensor:
        return self.target != VOID

    @property
    def one_hot(self) -> Tensor:
        """q of (3), [N,C,H,W] float64, zero at void pixels."""
        labels = torch.where(self.valid, self.target, C)
        return F.one_hot(labels, C + 1)[..., :C].movedim(3, 1).double()

    def conv(self, x: Tensor, number: int, bias: bool = True) -> Tensor:
        """(1)"""
        return F.conv2d(
            x.double(),
            self.weights[number].double(),
            self.biases[number].double() if bias else None,
            padding=1,
        )

    def fill_weights(self, arguments: dict[str, Any], number: int) -> None:
        """What prepare_kernel would leave."""
        layer = self.plan.layers[number]
        packed = torch.zeros(9, layer.in_pad, layer.out_pad)
        packed[:, : layer.c, : layer.k] = self.weights[number].permute(2, 3, 1, 0).reshape(9, layer.c, layer.k)
        arguments["packed"].copy_(packed.reshape(-1))
        if "bias" in arguments:
            arguments["bias"].copy_(F.pad(self.biases[number], (0, layer.out_pad - layer.k)))

    def tile_of(self) -> Tensor:
        """[N,H,W]: the number of the 4 x 32 tile of each pixel."""
        y, x = torch.arange(self.h)[:, None] // 4, torch.arange(self.w)[None, :] // 32
        across, down = -(-self.w // 32), -(-self.h // 4)
        return torch.arange(self.n)[:, None, None] * (across * down) + y * across + x

    def tile_sums(self, values: Tensor) -> Tensor:
        """[N,H,W] -> [tiles]"""
        tiles = self.tile_of().reshape(-1)
        return torch.zeros(int(tiles.max()) + 1, dtype=torch.float64).index_add_(0, tiles, values.double().reshape(-1))


def unpack(words: Tensor, planes: int, channels: int, pixels: int) -> Tensor:
    """Codes -> [planes, P, channels] bool."""
    wide = words.reshape(planes, -1, pixels).long()
    bits = words.itemsize * 8
    return torch.stack([(wide[:, k // bits] >> (k % bits)) & 1 for k in range(channels)], dim=2).bool()


def pack(bits: Tensor, words: Tensor) -> None:
    """[planes, P, channels] bool -> codes; the inverse of `unpack`."""
    planes, pixels, channels = bits.shape
    size = words.itemsize * 8
    wide = torch.zeros(planes, -(-channels // size), pixels, dtype=torch.int64)
    for k in range(channels):
        wide[:, k // size] |= bits[:, :, k].long() << (k % size)
    words.copy_(wide.reshape(-1))  # wraps: the uppermost bit becomes the sign


def close(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of float32 sums."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=5e-6, equal_nan=True)


def check_softmax(kernels: ModuleType) -> None:
    """(1') of the first layer's input and (6), with class weights, smoothing, void pixels and a bad label."""
    bench = Bench(kernels, (2, 5, 33), label_smoothing=0.1)
    bench.target[1, 2, 3] = C + 2
    bad = bench.target == C + 2
    (launch,) = bench.launches("softmax_fwd_kernel")
    run_guarded(launch)
    arguments = launch.arguments
    known = torch.where(bad, VOID, bench.target)
    assert torch.equal(arguments["labels"].reshape(bench.target.shape).long(), torch.where(known == VOID, C, known))
    bench.target = known
    p = torch.softmax(bench.logits.double(), 1) * (bench.valid | bad).unsqueeze(1)
    close(arguments["e"], rows(p - bench.one_hot, bench.plan.layers[0].in_pad))
    clean = torch.where(bench.valid, known, -100)
    ce = F.cross_entropy(
        bench.logits.double(), clean, bench.class_weight.double(), label_smoothing=0.1, reduction="none"
    )
    sums = [
        bench.tile_sums(torch.where(bad, torch.nan, ce)),
        bench.tile_sums(torch.where(bench.valid, bench.class_weight[clean.clamp(min=0)], 0.0)),
        bench.tile_sums(bench.valid | bad),
        bench.tile_sums(bad),
    ]
    close(arguments["partial"][:4], torch.stack(sums))


def check_soft_softmax(kernels: ModuleType) -> None:
    """The same for a distribution, whose values are looked at; pixels that hold none are NaN in the sums."""
    q = torch.softmax(randn(2, C, 5, 33, seed=7), 1)
    bench = Bench(kernels, (2, 5, 33), distribution=q, tolerance=0.05)
    at = bench.valid.nonzero()[:60].tolist()
    wrong = [(0.0, 1.0, 1.0), (0.0,), (-0.02, 1.02), (torch.nan, 1.0), (0.5, 0.56), (torch.inf,), (255.0,), (0.5, 0.44)]
    right = [(-0.008, 1.008), (0.5, 0.54), (0.5, 0.46), (1.0,)]
    values = [torch.tensor([*v, *[0.0] * (C - len(v))]) for v in (*wrong, *right)]
    bad = torch.zeros(2, 5, 33, dtype=torch.bool)
    for (n, y, x), value, number in zip(at[::5], values, range(len(values)), strict=True):
        q[n, :, y, x] = value
        bad[n, y, x] = number < len(wrong)
    q[(~bench.valid).unsqueeze(1).expand_as(q)] = torch.nan
    (launch,) = bench.launches("softmax_fwd_kernel")
    run_guarded(launch)
    goal = torch.where(bench.valid.unsqueeze(1), q, 0.0)
    ce = F.cross_entropy(bench.logits.double(), goal.double(), bench.class_weight.double(), reduction="none")
    sums = [torch.where(bad, torch.nan, ce), bench.valid, bench.valid, bad]
    close(launch.arguments["partial"][:4], torch.stack([bench.tile_sums(x) for x in sums]))
    close(launch.arguments["q"], rows(goal, bench.plan.layers[0].in_pad))
    launch.arguments["tolerance"] = 0.0
    run_guarded(launch)
    assert not launch.arguments["partial"][3].any()


def check_tile_class(kernels: ModuleType) -> None:
    """Against a loop over pixels; faults in the reach show at pixels on the very edge of it."""
    bench = Bench(kernels, (1, 13, 162))
    labels = torch.zeros(13, 162, dtype=torch.int64)  # 0 is what a careless load finds outside the image, too
    labels[9, 30] = 1  # the corner of what tile (1,1) sees in the second layer
    labels[7:, 127:] = C  # what tile (2,4) sees in the first layer
    (launch,) = bench.launches("tile_class_kernel")
    launch.arguments["labels"].copy_(labels.reshape(-1))
    run_guarded(launch)
    expected = torch.full((2, 4, 6), -1)
    for reach in (1, 2):
        for i in range(4):
            for j in range(6):
                top, bottom, left, right = 4 * i - reach, 4 * i + 4 + reach, 32 * j - reach, 32 * j + 32 + reach
                if top >= 0 and left >= 0 and bottom <= 13 and right <= 162:
                    values = labels[top:bottom, left:right].unique()
                    if len(values) == 1:
                        expected[reach - 1, i, j] = values[0]
    assert expected[0, 1:3, 1:5].tolist() == [[0, 0, -1, -1], [0, 0, -1, C]]
    assert expected[1, 1:3, 1:5].tolist() == [[-1, 0, -1, -1], [-1, -1, -1, -1]]
    assert torch.equal(launch.arguments["classes"].long(), expected.reshape(2, -1))


def check_prepare(kernels: ModuleType) -> None:
    """Packed weights, and tables against convolutions of constant images, class C being the zero image."""
    bench = Bench(kernels, (1, 1, 1))
    constant = torch.cat([torch.eye(C), torch.zeros(1, C)]).double()[:, :, None, None].expand(-1, -1, 9, 9)
    for number, launch in enumerate(bench.launches("prepare_kernel")):
        run_guarded(launch)
        arguments, layer = launch.arguments, bench.plan.layers[number]
        expected = {name: torch.empty_like(arguments[name]) for name in ("packed", "packed_bias")}
        bench.fill_weights({"packed": expected["packed"], "bias": expected["packed_bias"]}, number)
        assert torch.equal(arguments["packed"], expected["packed"])
        assert torch.equal(arguments["packed_bias"], expected["packed_bias"])
        if number >= bench.plan.target_layers:
            assert arguments["table"] is None
            continue
        features = bench.conv(constant, number)
        constant = features.relu()
        center = F.pad(features[:, :, 4, 4], (0, layer.out_pad - layer.k))
        close(arguments["table"], center)
        close(arguments["activated"], center.relu())


def check_saturation(kernels: ModuleType) -> None:
    """fp16 ends at 65504; infinity would turn into NaN further on."""
    bench = Bench(kernels, (1, 1, 1), torch.float16)
    launch = bench.launches("prepare_kernel")[0]
    launch.arguments["bias"].fill_(1e6)
    run_guarded(launch)
    assert (launch.arguments["activated"] == 65504).all()


def check_first_layer(kernels: ModuleType) -> None:
    """(1') to (4) and the codes, from labels, where one tile of four takes its target features from the table."""
    bench = Bench(kernels, (1, 5, 33))
    launch = bench.launches("layer_fwd_kernel")[0]
    arguments, layer = launch.arguments, bench.plan.layers[0]
    e = randn(1, C, 5, 33, seed=3)
    row = randn(16, seed=5)
    known = (bench.tile_of() == 0).unsqueeze(1)
    t_q = torch.where(known, row[:, None, None], bench.conv(bench.one_hot, 0))
    arguments["x_in"].copy_(rows(e, layer.in_pad))
    arguments["labels"].copy_(torch.where(bench.valid, bench.target, C).reshape(-1))
    bench.fill_weights(arguments, 0)
    arguments["table"].fill_(float("nan"))
    arguments["table"][2] = row
    arguments["classes"].copy_(torch.tensor([2, -1, -1, -1]))
    check_hidden_features(bench, 0, launch, bench.conv(e, 0, bias=False), t_q, elided=0)


def check_hidden_layer(kernels: ModuleType) -> None:
    """The same from features, which in one tile are those of the table of the layer before."""
    bench = Bench(kernels, (1, 5, 33))
    launch = bench.launches("layer_fwd_kernel")[1]
    arguments, layer = launch.arguments, bench.plan.layers[1]
    x, a_q = randn(1, 16, 5, 33, seed=3), randn(1, 16, 5, 33, seed=4).relu()
    known = (bench.tile_of() == 0).unsqueeze(1)
    row = randn(16, seed=5).relu()
    a_q = torch.where(known, row[:, None, None], a_q)
    t_q = bench.conv(a_q, 1)
    arguments["x_in"].copy_(rows(x, layer.in_pad))
    arguments["xq"].copy_(rows(torch.where(known, torch.nan, a_q), layer.in_pad))
    arguments["labels"].copy_(torch.where(bench.valid, bench.target, C).reshape(-1))
    bench.fill_weights(arguments, 1)
    arguments["prev_activated"].fill_(float("nan"))
    arguments["prev_activated"][2] = row
    arguments["prev_classes"].copy_(torch.tensor([2, -1, -1, -1]))
    arguments["classes"].fill_(-1)
    check_hidden_features(bench, 1, launch, bench.conv(x, 1, bias=False), t_q)


def check_hidden_features(
    bench: Bench, number: int, launch: Any, d: Tensor, t_q: Tensor, elided: int | None = None
) -> None:
    """Run one hidden layer under tap "pre" and compare all that it writes; d and t_q [N,K,H,W] float64."""
    arguments, layer = launch.arguments, bench.plan.layers[number]
    run_guarded(launch)
    close(arguments["b"], rows((t_q + d).relu() - t_q.relu(), layer.out_pad))
    if arguments["aq"] is not None:
        written = torch.ones(d.shape[0], *d.shape[2:], dtype=torch.bool)
        written = (written if elided is None else bench.tile_of() != elided).reshape(-1)
        close(arguments["aq"][written], rows(t_q.relu(), layer.out_pad)[written])
    seen = d * bench.valid.unsqueeze(1)
    close(arguments["partial"], bench.tile_sums(seen.abs().sum(1)) * layer.inverse)
    codes = unpack(arguments["codes"], 3, layer.k, bench.plan.pixels)
    for plane, value in zip(codes, (seen, -seen, t_q + d), strict=True):
        value = rows(value, layer.k)
        sure = (value == 0) | (value.abs() > 1e-5)  # else a bit that rounding decides
        assert torch.equal(plane[sure], (value > 0)[sure])


def check_last_layer(kernels: ModuleType) -> None:
    """Under tap "post": codes of what both sides of the ReLU leave, and the distance behind it."""
    bench = Bench(kernels, (2, 5, 7), tap="post")
    launch = bench.launches("layer_fwd_kernel")[2]
    arguments, layer = launch.arguments, bench.plan.layers[2]
    x, a_q = randn(2, 48, 5, 7, seed=3), randn(2, 48, 5, 7, seed=4).relu()
    arguments["x_in"].copy_(rows(x, layer.in_pad))
    arguments["xq"].copy_(rows(a_q, layer.in_pad))
    arguments["labels"].copy_(torch.where(bench.valid, bench.target, C).reshape(-1))
    bench.fill_weights(arguments, 2)
    arguments["prev_classes"].fill_(-1)
    arguments["classes"].fill_(-1)
    run_guarded(launch)
    t_q = bench.conv(a_q, 2)
    t_p = t_q + bench.conv(x, 2, bias=False)
    seen = (t_p.relu() - t_q.relu()) * bench.valid.unsqueeze(1)
    close(arguments["partial"], bench.tile_sums(seen.abs().sum(1)) * layer.inverse)
    codes = unpack(arguments["codes"], 2, layer.k, bench.plan.pixels)
    on = rows(t_p, layer.k) > 0
    assert torch.equal(codes[0] & ~codes[1], on & (rows(seen, layer.k) > 0))
    assert torch.equal(codes[1] & ~codes[0], on & (rows(seen, layer.k) < 0))
    assert torch.equal(codes[0] | codes[1], on)


def check_layer_bwd(kernels: ModuleType) -> None:
    """(7), (8a) and (9): of the last layer from codes alone, then of the hidden one below, with two words a pixel."""
    bench = Bench(kernels, (1, 5, 33))
    plan, launches = bench.plan, bench.launches("layer_bwd_kernel", backward=True)
    d_t, codes = None, {}
    for layer in plan.layers:
        above = uniform(plan.pixels, layer.k, seed=30 + layer.number) < 0.4
        below = ~above & (uniform(plan.pixels, layer.k, seed=40 + layer.number) < 0.6)
        on = uniform(plan.pixels, layer.k, seed=50 + layer.number) < 0.5
        codes[layer.number] = torch.stack([above, below, on][: layer.planes])
    for number in (2, 1):
        layer, before = plan.layers[number], plan.layers[number - 1]
        arguments = launches[number - 1].arguments
        bench.fill_weights(arguments, number)
        pack(codes[number], arguments["codes"])
        pack(codes[number - 1], arguments["prev_codes"])
        run_guarded(launches[number - 1])

        def seed(of: Any) -> Tensor:
            slope = codes[of.number][0].double() - codes[of.number][1].double()
            return (slope * of.coefficient / plan.unit).reshape(bench.n, bench.h, bench.w, of.k).movedim(3, 1)

        d_t = seed(layer) if d_t is None else d_t
        d_a = F.conv_transpose2d(d_t, bench.weights[number].double(), padding=1)
        on = codes[number - 1][2].reshape(bench.n, bench.h, bench.w, before.k).movedim(3, 1)
        d_t = seed(before) + on * d_a
        close(arguments["d_prev"].reshape(plan.pixels, -1)[:, : before.k], rows(d_t, before.k))


def check_logits_bwd(kernels: ModuleType) -> None:
    """(9) to (12) against autograd, with NaN under void pixels."""
    bench = Bench(kernels, (2, 5, 33), label_smoothing=0.1)
    layer = bench.plan.layers[0]
    d_t = randn(2, 16, 5, 33, seed=6)
    (launch,) = bench.launches("logits_bwd_kernel", backward=True)
    bench.fill_weights(launch.arguments, 0)
    launch.arguments["d_t"].copy_(rows(d_t, layer.out_pad).reshape(launch.arguments["d_t"].shape))
    z = torch.where(bench.valid.unsqueeze(1), bench.logits, 0.0).double().requires_grad_()
    labels = torch.where(bench.valid, bench.target, -100)
    ce = F.cross_entropy(z, labels, bench.class_weight.double(), label_smoothing=0.1, reduction="sum")
    p = torch.softmax(z, 1) * bench.valid.unsqueeze(1)
    semeda = bench.plan.unit * (bench.conv(p, 0) * d_t).sum()
    (expected,) = torch.autograd.grad(float(bench.scales[0]) * ce + float(bench.scales[1]) * semeda, z)
    bench.logits.masked_fill_(~bench.valid.unsqueeze(1), float("nan"))
    run_guarded(launch)
    close(bench.d_logits, expected)
    assert not bench.d_logits.masked_select(~bench.valid.unsqueeze(1)).any()


def check_sum(kernels: ModuleType) -> None:
    """Rows of 5000 tiles, in float64: a float32 sum would be off in the eighth digit."""
    launch = importlib.import_module(f"{kernels.__name__}.launch")
    partial = 1 + uniform(3, 5000)
    sums = torch.empty(3, dtype=torch.float64)
    arguments = {"partial": partial, "sums": sums, "tiles": 5000, "BLOCK": 2048}
    run_guarded(launch.Launch(launch.sum_kernel, 3, arguments, 8))
    torch.testing.assert_close(sums, partial.double().sum(1), rtol=1e-12, atol=0)


def check_finish(kernels: ModuleType) -> None:
    """(5) without its lambdas; NaN where a label was bad."""
    bench = Bench(kernels, (1, 1, 1))
    launch = bench.forward[-1]
    for bad in (0, 2):
        sums = torch.tensor([12.5, 7.25, 9.0, bad, 1.5, 2.5, 4.0], dtype=torch.float64)
        launch.arguments["sums"].copy_(sums)
        run_guarded(launch)
        semeda = float("nan") if bad else 1.5 * 1.0 + 2.5 * 0.5 + 4.0 * 3.0
        close(launch.arguments["terms"], torch.tensor([12.5, semeda, 7.25, 1.5, 2.5, 4.0]))
        assert launch.arguments["counts"].tolist() == [9, bad]


Check = Callable[[ModuleType], None]
CHECKS: tuple[Check, ...] = (
    check_softmax, check_soft_softmax, check_tile_class, check_prepare, check_saturation, check_first_layer,
    check_hidden_layer, check_last_layer, check_layer_bwd, check_logits_bwd, check_sum, check_finish,
)  # fmt: skip
