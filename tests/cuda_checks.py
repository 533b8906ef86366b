"""Scenes for the CUDA kernels' bodies, and checks of every number that comes out against float64 (cuda_oracle.py).

`python tests/cuda_checks.py` runs SCENES on the module that SEMEDA_FAST_CUDA_EMULATION names and exits with 1 at the
first that fails: tests/test_cuda_faults.py does so with faulty modules, which may well crash.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cuda_machine import D_CE, D_SEMEDA, Result, get_number, machine, run
from cuda_oracle import SIGMAS, Codes, Network, Rounding, d_probabilities, decode, features
from helpers import VOID, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends.config import FusedConfig
from semeda_fast.backends.problem import Problem

OUTPUT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of a gradient, relative
TINY = 2.0**-24  # half of fp16's smallest number, and more than all that fp32 loses


@dataclass(frozen=True)
class Scene:
    """One problem, and numbers of the machine that runs it."""

    h: int = 21
    w: int = 37
    n: int = 1
    classes: int = 5
    widths: tuple[int, ...] = (16, 32)
    edge_classes: int = 2
    bias: bool = True
    tap: str = "pre"
    dtype: torch.dtype = torch.float16
    labels: str = "blocks"
    binary: bool = False
    smoothing: float = 0.0
    weighted: bool = False
    masked: bool = False
    channels_last: bool = False
    machine: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {key: value for key, value in vars(self).items() if value != getattr(Scene, key, None)}
        numbers = " ".join(f"{key}={value}" for key, value in shown.pop("machine").items())
        return " ".join([*(f"{key}={value}" for key, value in shown.items()), numbers]).replace("torch.", "").strip()


def labels_of(scene: Scene) -> Tensor:
    """[N,H,W] uint8 labels, VOID among them."""
    n, h, w, classes = scene.n, scene.h, scene.w, min(scene.classes, VOID)
    generator = torch.Generator().manual_seed(5)
    y, x = torch.arange(h)[:, None], torch.arange(w)[None, :]
    if scene.labels == "uniform":
        one = torch.full((h, w), classes - 1)
    elif scene.labels == "edge":
        one = torch.where(x < w // 2, 0, classes - 1).expand(h, w)
    elif scene.labels == "stray":  # one pixel of another class
        one = torch.where((y == h // 2) & (x == w // 2), 0, classes - 1)
    elif scene.labels == "void":
        one = torch.full((h, w), VOID)
    elif scene.labels == "frame":  # void next to the border
        inner = (y >= 1) & (y < h - 1) & (x >= 1) & (x < w - 1)
        one = torch.where(inner, torch.where(y + x < w // 2, 0, classes - 1), VOID)
    elif scene.labels == "hole":  # a class beside much void
        one = torch.where((y >= h // 3) & (x >= w // 3), VOID, (y < h // 6).long())
    elif scene.labels == "noise":
        maps = torch.randint(0, classes, (n, h, w), generator=generator)
        return torch.where(torch.rand((n, h, w), generator=generator) < 0.1, VOID, maps).to(torch.uint8)
    else:
        coarse = torch.randint(0, classes, (n, (h + 5) // 6, (w + 8) // 9), generator=generator)
        maps = coarse.repeat_interleave(6, dim=1).repeat_interleave(9, dim=2)[:, :h, :w].clone()
        maps[torch.rand(maps.shape, generator=generator) < 0.02] = VOID
        return maps.to(torch.uint8)
    return one.expand(n, h, w).to(torch.uint8).contiguous()


@functools.cache
def proxy_of(classes: int, widths: tuple[int, ...], edge_classes: int, tap: str) -> EdgeProxy:
    layer_weights = [1.0 - 0.2 * (number % 3) for number in range(len(widths) + 1)]
    return make_proxy(classes, widths=widths, edge_classes=edge_classes, tap=tap, layer_weights=layer_weights)


def problem_of(scene: Scene) -> Problem:
    """Logits and labels, made anew from fixed seeds."""
    generator = torch.Generator().manual_seed(3)
    channels = 1 if scene.binary else scene.classes
    shape = (scene.n, channels, scene.h, scene.w)
    logits = (2 * torch.randn(shape, generator=generator)).to(scene.dtype)
    if scene.channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    target = labels_of(scene)
    valid = torch.rand(target.shape, generator=generator) < 0.8 if scene.masked else None
    weight = 0.2 + torch.rand(scene.classes, generator=generator) if scene.weighted else None
    proxy = proxy_of(scene.classes, scene.widths, scene.edge_classes, scene.tap)
    config = FusedConfig(
        channels=(scene.classes, *(layer.out_channels for layer in proxy.layers)),
        sizes=(3,) * proxy.num_layers,
        layer_weights=tuple(proxy.layer_weights),
        layer_scales=proxy.layer_scales("l1"),
        tap=scene.tap,
        distance="l1",
        ignore_index=VOID,
        label_smoothing=scene.smoothing,
        mode="binary" if scene.binary else "multiclass",
        reduction="mean",
    )
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in (*proxy.weights, *proxy.biases)])
    if not scene.bias:
        flat[-sum(config.channels[1:]) :] = 0
    return Problem(logits, target, valid, weight, flat, config)


class Oracle:
    """The same problem in float64."""

    def __init__(self, problem: Problem) -> None:
        logits, target, valid, weight, flat, config = problem
        self.problem, self.rounding = problem, Rounding.of(logits.dtype)
        z = logits.double()
        self.z = torch.cat([torch.zeros_like(z), z], dim=1) if config.mode == "binary" else z
        self.v = (target != config.ignore_index) & (True if valid is None else valid)
        self.y = torch.where(self.v, target.long(), -100)
        self.weight = None if weight is None else weight.double()
        plane = self.v.unsqueeze(1)
        self.s = self.z.softmax(dim=1)
        p = self.s * plane
        q = F.one_hot(torch.where(self.v, self.y, 0), self.s.shape[1]).permute(0, 3, 1, 2) * plane
        shapes = list(zip(config.channels[1:], config.channels, strict=False))
        parts = flat.double().split([*(9 * out * before for out, before in shapes), *config.channels[1:]])
        weights = [part.reshape(out, before, 3, 3) for part, (out, before) in zip(parts, shapes, strict=False)]
        inverse = [1 / (out * s) for (out, _), s in zip(shapes, config.layer_scales, strict=True)]
        coefficients = [w * i for w, i in zip(config.layer_weights, inverse, strict=True)]
        self.network = Network(weights, parts[len(shapes) :], inverse, coefficients, config.tap == "post")
        self.layers = features(p, q.double(), self.network, self.rounding)
        around = F.max_pool2d(plane.double(), 3, 1, 1)
        self.reached = [around := F.max_pool2d(around, 3, 1, 1) if number else around for number in range(len(shapes))]

    def cross_entropy(self, z: Tensor) -> Tensor:
        smoothing = self.problem.config.label_smoothing
        return F.cross_entropy(z, self.y, self.weight, reduction="sum", label_smoothing=smoothing)

    def check_terms(self, terms: Tensor, counts: Tensor) -> None:
        """Sums of the batch: counts exactly, cross-entropy to fp32, distances to what rounding may change of them."""
        assert counts.tolist() == [int(self.v.sum()), 0], "valid and bad labels"
        weights = torch.ones_like(self.z[0, :, 0, 0]) if self.weight is None else self.weight
        divisor = float(weights[self.y[self.v]].sum())
        _close("cross-entropy", terms[0], float(self.cross_entropy(self.z)), 1e-5)
        _close("ce_weight", terms[2], divisor, 1e-6)
        total = slack = 0.0
        plane = self.v.unsqueeze(1)
        for number, layer in enumerate(self.layers):
            exact = float((layer.distance.abs() * plane).sum())
            error = SIGMAS * float((layer.distance_error.square() * plane).sum().sqrt())
            error += exact * (2e-6 if self.problem.logits.dtype == torch.float32 else 5e-4)  # in common: of weights
            _close(f"layer {number}", terms[3 + number], self.network.inverse[number] * exact, 0, error)
            total += self.network.coefficients[number] * exact
            slack += self.network.coefficients[number] * error
        _close("semeda", terms[1], total, 0, slack)

    def check_codes(self, codes: Tensor) -> list[Codes]:
        """Every bit but those that rounding may change; returns all."""
        found = decode(codes, tuple(self.y.shape), self.problem.config.channels[1:])
        plane = self.v.unsqueeze(1)
        for number, (layer, bits) in enumerate(zip(self.layers, found, strict=True)):
            where = f"of layer {number}"
            if bits.on is not None:
                _same_bits(f"'on' {where}", bits.on, layer.positive, layer.positive_sure)
            signs = plane & (layer.positive if self.network.post else True)
            # Where only void pixels are in reach both branches are the same, bit for bit.
            zero = ~plane | (self.reached[number] == 0)
            sure = layer.distance.abs() > SIGMAS * layer.distance_error
            if self.network.post:
                sure &= layer.positive_sure
            _same_bits(f"'above' {where}", bits.above, signs & ~zero & (layer.distance > 0), sure | zero)
            _same_bits(f"'below' {where}", bits.below, signs & ~zero & (layer.distance < 0), sure | zero)
            assert not bool((bits.above & bits.below).any()), f"above and below at once {where}"
        return found

    def check_gradient(self, d_logits: Tensor, codes: list[Codes], d_ce: float, d_semeda: float) -> None:
        """d_logits from the bits that backward has read: no sign is in doubt, so each number has a bound."""
        exact, bound = self.gradient(codes, d_ce, d_semeda)
        error = (d_logits.double() - exact).abs()
        bad = ~(error <= bound + OUTPUT[d_logits.dtype] * exact.abs() + TINY)
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"gradient: {int(bad.sum())} of {bad.numel()} are wrong, such as {first}: {d_logits[first].item():.5g} "
                f"where {exact[first].item():.5g} was expected to within {bound[first].item():.2g}"
            )
        void = ~self.v.unsqueeze(1).expand_as(d_logits)
        assert bool((d_logits[void] == 0).all()), "a void pixel has a gradient"

    def gradient(self, codes: list[Codes], d_ce: float, d_semeda: float) -> tuple[Tensor, Tensor]:
        z = self.z.clone().requires_grad_()
        (from_ce,) = torch.autograd.grad(self.cross_entropy(z), z)
        d_p, error = d_probabilities(codes, self.network, self.rounding)
        plane, s = self.v.unsqueeze(1), self.s
        exact = d_ce * from_ce + d_semeda * plane * s * (d_p - (s * d_p).sum(dim=1, keepdim=True))
        size = d_p.abs() + (s * d_p.abs()).sum(dim=1, keepdim=True)
        error = (error.square() + (s * error).square().sum(dim=1, keepdim=True)).sqrt()
        bound = abs(d_semeda) * s * (SIGMAS * error + 2.0**-19 * size)
        scale = 1.0 if self.weight is None else float(self.weight.max())
        bound = plane * (bound + abs(d_ce) * 2.0**-19 * scale)
        return (exact[:, 1:], bound[:, 1:]) if self.problem.config.mode == "binary" else (exact, bound)

    def doubtful(self) -> float:
        """The largest share of a layer's signs that rounding may change: a check of nothing would pass."""
        shares = []
        for layer in self.layers:
            error = SIGMAS * layer.distance_error
            shares.append(float(((layer.distance.abs() <= error) & (error > 0)).double().mean()))
        return max(shares)


def _close(what: str, found: Tensor, exact: float, relative: float, absolute: float = 0.0) -> None:
    error = abs(float(found) - exact)
    assert error <= relative * abs(exact) + absolute + 1e-30, (
        f"{what} is {float(found):.9g}, not {exact:.9g} to within {relative * abs(exact) + absolute:.2g}"
    )


def _same_bits(what: str, found: Tensor, exact: Tensor, sure: Tensor) -> None:
    wrong = (found != exact) & sure
    if bool(wrong.any()):
        raise AssertionError(f"codes {what}: {int(wrong.sum())} bits are wrong, such as {wrong.nonzero()[0].tolist()}")


def decode_of(problem: Problem, result: Result) -> list[Codes]:
    """The bits of all layers."""
    return decode(result.codes, tuple(problem.target.shape), problem.config.channels[1:])


def examine(scene: Scene, twice: bool = True, problem: Problem | None = None) -> Result:
    """Run a scene, or its machine on another problem, and check all that comes out.

    The second time memory holds other poison, and the warps run from the last to the first.
    """
    problem = problem or problem_of(scene)
    with machine(**scene.machine):
        result = run(problem)
        oracle = Oracle(problem)
        oracle.check_terms(result.terms, result.counts)
        codes = oracle.check_codes(result.codes)
        oracle.check_gradient(result.d_logits, codes, D_CE, D_SEMEDA)
        if twice:
            with machine(backwards=1 - get_number("backwards")):
                result.assert_same(run(problem, poison=0x3C), "other poison, other order of the warps")
    return result


def examine_large_activations() -> None:
    """A first layer whose weights fit fp16 and whose sums do not: saturated, since infinities would make all NaN."""
    problem = problem_of(Scene(h=12, w=20, labels="noise", machine=SMALL_TILES))
    first = 9 * problem.config.channels[0] * problem.config.channels[1]
    flat = problem.flat.clone()
    flat[:first] *= 6e4 / flat[:first].abs().max()
    problem = problem._replace(flat=flat)
    with machine(**SMALL_TILES):
        result = run(problem)
    activations = Oracle(problem._replace(logits=problem.logits.float())).layers[0].distance.abs().max()
    assert float(activations) > 65504, f"the largest activation is {float(activations):.0f}: this shows nothing"
    for name, found in (("terms", result.terms), ("gradient", result.d_logits)):
        assert bool(found.isfinite().all()), f"activations above fp16's largest number: {name} not finite"


SMALL_TILES = {"tile_rows": 8, "tile_width": 16, "multiprocessors": 2}  # of 8 x 12 pixels in a network of 3 layers
STAGED = {"shared_per_block": 40 << 10, "shared_per_multiprocessor": 41 << 10}  # weights do not stay
# What tests/test_cuda_faults.py runs: the default proxy in half precision, by every way through its kernels.
SCENES = [
    Scene(h=19, w=29, labels="noise", machine=SMALL_TILES),
    Scene(h=40, w=50, n=2, labels="uniform", dtype=torch.bfloat16, machine=SMALL_TILES),
    Scene(h=40, w=50, labels="stray", tap="post", machine=SMALL_TILES),
    Scene(h=21, w=37, labels="frame", bias=False, classes=12, dtype=torch.bfloat16, tap="post"),
    Scene(h=13, w=47, classes=20, smoothing=0.1, weighted=True, masked=True, channels_last=True, machine=STAGED),
    Scene(h=33, w=20, classes=50, labels="noise", dtype=torch.bfloat16, machine={**STAGED, "multiprocessors": 1}),
    Scene(h=25, w=40, classes=50, tap="post", machine={"tile_rows": 20, "tile_width": 32}),
    Scene(h=40, w=50, labels="hole", machine=SMALL_TILES),
    # The edge is in the last column that the first 16 pixels of the second tile depend on.
    Scene(h=24, w=116, labels="edge", machine={"tile_rows": 8, "tile_width": 48}),
    Scene(h=9, w=13, n=2, classes=2, binary=True, machine=SMALL_TILES),
    Scene(h=1, w=1),
]


def main() -> int:
    """Runs SCENES; 1 where one of them fails, with the cause on stdout."""
    for scene in SCENES:
        try:
            examine(scene)
        except (AssertionError, RuntimeError) as error:
            print(f"SEEN in {scene}: {type(error).__name__}: {error}")
            return 1
    try:
        examine_large_activations()
    except (AssertionError, RuntimeError) as error:
        print(f"SEEN in large activations: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
