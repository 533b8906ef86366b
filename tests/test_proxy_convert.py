"""EdgeProxy.from_sequential computes what the nn.Sequential computes in eval mode, or says why it cannot."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from semeda_fast import EdgeProxy, semeda_loss
from semeda_fast.proxy.record import ProxyLayer


def conv(a: int, b: int, k: int = 3, stride: int = 1, dilation: int = 1, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, stride, dilation * (k // 2), dilation, bias=bias)


def norm(channels: int, *, affine: bool = True, eps: float = 1e-5) -> nn.BatchNorm2d:
    """A BatchNorm whose statistics and parameters differ from the identity in every channel."""
    module = nn.BatchNorm2d(channels, affine=affine, eps=eps)
    generator = torch.Generator().manual_seed(channels)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean.copy_(torch.randn(channels, generator=generator))
    module.running_var.copy_(torch.rand(channels, generator=generator) + 0.1)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.randn(channels, generator=generator))  # negative factors too
            module.bias.copy_(torch.randn(channels, generator=generator))
    return module


def flat(network: nn.Module) -> list[nn.Module]:
    """The leaf modules in the order in which they run, one that is used twice twice."""
    children = list(network._modules.values())
    if not isinstance(network, nn.Sequential):
        return [network]
    return [leaf for child in children if child is not None for leaf in flat(child)]


@torch.no_grad()
def expected_taps(network: nn.Sequential, x: Tensor, tap: str) -> list[Tensor]:
    """What `network` holds in eval mode behind each convolution (and its BatchNorm), or behind its ReLU."""
    network = network.eval()
    taps: list[Tensor] = []
    a = x
    for module in flat(network):
        a = module(a.clone())  # a ReLU may work in place
        if isinstance(module, nn.Conv2d):
            taps.append(a)
        elif isinstance(module, nn.BatchNorm2d):
            taps[-1] = a
    return [t.relu() for t in taps] if tap == "post" else taps


def assert_equal(network: nn.Sequential, *, size: tuple[int, int] = (29, 26), channels: int = 4) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.softmax(2 * torch.randn(2, channels, *size, generator=generator), dim=1)
    for tap in ("pre", "post"):
        proxy = EdgeProxy.from_sequential(network, tap=tap)
        assert proxy.tap == tap
        expected = expected_taps(network, x, tap)
        assert proxy.num_layers == len(expected)
        for ours, theirs in zip(proxy.features(x), expected, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(11)


# --- what is taken ----------------------------------------------------------------------------------------

TAKEN: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": lambda: [conv(4, 16), nn.ReLU(), conv(16, 32), nn.ReLU(), conv(32, 2)],
    "one convolution": lambda: [conv(4, 3)],
    "a ReLU at the end": lambda: [conv(4, 6), nn.ReLU(), conv(6, 3), nn.ReLU()],
    "in-place ReLU, no bias": lambda: [conv(4, 6, bias=False), nn.ReLU(inplace=True), conv(6, 3, bias=False)],
    "two ReLUs in a row": lambda: [conv(4, 6), nn.ReLU(), nn.ReLU(), conv(6, 3)],
    "kernels 1, 5, 7": lambda: [conv(4, 6, 1), nn.ReLU(), conv(6, 5, 5), nn.ReLU(), conv(5, 3, 7)],
    "padding='same'": lambda: [
        nn.Conv2d(4, 6, 5, padding="same", dilation=2),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3, padding="same"),
    ],
    "dilation": lambda: [conv(4, 6, 3, 1, 2), nn.ReLU(), conv(6, 3, 5, 1, 3)],
    "stride": lambda: [conv(4, 6, 3, 2), nn.ReLU(), conv(6, 5, 5, 3), nn.ReLU(), conv(5, 3)],
    "stride and dilation": lambda: [conv(4, 6, 3, 2, 2), nn.ReLU(), conv(6, 3, 3, 2, 3)],
    "max-pooling": lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 3)],
    "max-pooling 3, tuples": lambda: [
        conv(4, 6),
        nn.ReLU(),
        nn.MaxPool2d((3, 3), (3, 3), (0, 0)),
        conv(6, 3),
    ],
    "average-pooling": lambda: [conv(4, 6), nn.ReLU(), nn.AvgPool2d(3), conv(6, 3)],
    "average-pooling first": lambda: [nn.AvgPool2d(2, 2), conv(4, 6), nn.ReLU(), conv(6, 3)],
    "max-pooling first": lambda: [nn.MaxPool2d(2), conv(4, 6), nn.ReLU(), conv(6, 3)],
    "pooling with a window of 1": lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(1), conv(6, 3)],
    "pooling and stride": lambda: [conv(4, 6, 3, 2), nn.ReLU(), nn.AvgPool2d(2), conv(6, 3, 3, 2)],
    "pooling, then a ReLU again": lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), conv(6, 3)],
    "BatchNorm": lambda: [conv(4, 6), norm(6), nn.ReLU(), conv(6, 3), norm(3)],
    "BatchNorm, no bias": lambda: [conv(4, 6, bias=False), norm(6), nn.ReLU(), conv(6, 3)],
    "BatchNorm, not affine": lambda: [conv(4, 6), norm(6, affine=False, eps=0.1), nn.ReLU(), conv(6, 3)],
    "BatchNorm, strided, dilated": lambda: [
        conv(4, 6, 5, 2, 2),
        norm(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(6, 3),
    ],
    "dropout and identity": lambda: [
        nn.Dropout(0.5),
        conv(4, 6),
        nn.Identity(),
        norm(6),
        nn.Dropout2d(0.5),
        nn.ReLU(),
        nn.Dropout(0.9),
        conv(6, 3),
        nn.Identity(),
    ],
    "nested": lambda: [
        nn.Sequential(conv(4, 6), nn.Sequential(norm(6), nn.ReLU())),
        nn.Sequential(nn.Sequential(conv(6, 5), nn.ReLU())),
        nn.Sequential(),
        conv(5, 3),
    ],
}


@pytest.mark.parametrize("name", TAKEN)
def test_outputs_equal_those_of_the_sequential(name: str) -> None:
    assert_equal(nn.Sequential(*TAKEN[name]()))


def test_a_module_used_twice_runs_twice() -> None:
    relu, pool, twice = nn.ReLU(), nn.MaxPool2d(2), conv(6, 6)
    assert_equal(nn.Sequential(conv(4, 6), relu, conv(6, 6), relu, conv(6, 3)))
    assert_equal(nn.Sequential(conv(4, 6), nn.ReLU(), pool, conv(6, 6), nn.ReLU(), pool, conv(6, 3)))
    assert_equal(nn.Sequential(conv(4, 6), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), conv(6, 3)))


def test_parametrised_weights_are_taken_as_they_are_used() -> None:
    assert_equal(nn.Sequential(weight_norm(conv(4, 6)), nn.ReLU(), conv(6, 3)))


def test_named_modules_are_taken() -> None:
    assert_equal(nn.Sequential(OrderedDict(first=conv(4, 6), act=nn.ReLU(), last=conv(6, 3))))


def test_weights_come_over_exactly_where_nothing_is_folded() -> None:
    network = nn.Sequential(*TAKEN["plain"]())
    proxy = EdgeProxy.from_sequential(network)
    for module, weight, bias in zip((network[0], network[2], network[4]), proxy.weights, proxy.biases, strict=True):
        assert isinstance(module, nn.Conv2d)
        assert module.bias is not None
        assert torch.equal(weight, module.weight)
        assert torch.equal(bias, module.bias)
        assert not weight.requires_grad


def test_layers_scales_and_provenance_of_the_result() -> None:
    network = nn.Sequential(conv(4, 6, 5, 2, 3), nn.ReLU(), nn.AvgPool2d(2), conv(6, 3, 1))
    proxy = EdgeProxy.from_sequential(network, tap="post", distance="l2", layer_weights=(0, 1))
    assert proxy.layers == (ProxyLayer(4, 6, 5, 2, 3, 0), ProxyLayer(6, 3, 1, 1, 1, -2))
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("post", "l2", (0.0, 1.0))
    assert proxy.layer_scales("l2") == (1.0, 1.0)
    assert proxy.provenance["trained"] is True
    assert proxy.provenance["source"] == "nn.Sequential"
    assert EdgeProxy.from_sequential(network).tap == "pre"


def test_the_network_is_not_changed_and_the_proxy_is_a_copy() -> None:
    network = nn.Sequential(*TAKEN["BatchNorm"]()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    proxy = EdgeProxy.from_sequential(network)
    assert network.training
    assert all(module.training for module in network)
    for buffer in proxy.buffers():
        buffer.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    fresh = EdgeProxy.from_sequential(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(weight.abs().sum() > 0 for weight in fresh.weights)


def test_folding_is_exact_to_float32_even_for_extreme_statistics() -> None:
    module = norm(6)
    assert module.running_var is not None
    module.running_var.copy_(torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0]))
    network = nn.Sequential(conv(4, 6), module)
    x = torch.rand(1, 4, 9, 9)
    (ours,) = EdgeProxy.from_sequential(network).features(x)
    exact = network.double().eval()(x.double()).detach()
    error = (ours - exact).abs().amax(dim=(0, 2, 3)) / exact.abs().amax(dim=(0, 2, 3))
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_networks_of_another_dtype_become_float32(dtype: torch.dtype) -> None:
    network = nn.Sequential(conv(4, 6), norm(6), nn.ReLU(), conv(6, 3)).to(dtype)
    proxy = EdgeProxy.from_sequential(network)
    assert all(tensor.dtype == torch.float32 for tensor in proxy.buffers())
    x = torch.rand(1, 4, 9, 9)
    expected = network.double().eval()(x.double()).float()
    torch.testing.assert_close(proxy.edge_logits(x), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_runs_on_a_converted_network_with_stride_and_pooling() -> None:
    network = nn.Sequential(conv(4, 6, 3, 2), norm(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 3))
    logits = torch.randn(2, 4, 17, 15, requires_grad=True)
    target = torch.randint(0, 4, (2, 17, 15))
    loss = semeda_loss(
        logits,
        target,
        EdgeProxy.from_sequential(network),
        lambda_ce=0.0,
        lambda_semeda=1.0,
        backend="reference",
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert float(loss.detach()) > 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


# --- what is refused --------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A convolution that computes something else than a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Residual(nn.Sequential):
    """A Sequential that does more than running its children one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def without_statistics() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(6, track_running_stats=False)


R = nn.ReLU
# (modules, the name of the layer at fault, the cause)
REFUSED: dict[str, tuple[Sequence[nn.Module], str, str]] = {
    "Linear": ([conv(4, 6), R(), nn.Linear(6, 2)], "2", "cannot be run: a proxy is made of nn.Conv2d"),
    "Sigmoid": ([conv(4, 6), nn.Sigmoid(), conv(6, 2)], "1", "cannot be run"),
    "LeakyReLU": ([conv(4, 6), nn.LeakyReLU(), conv(6, 2)], "1", "cannot be run"),
    "ReLU6": ([conv(4, 6), nn.ReLU6(), conv(6, 2)], "1", "cannot be run"),
    "Softmax at the end": ([conv(4, 6), R(), conv(6, 2), nn.Softmax(1)], "3", "cannot be run"),
    "Flatten": ([conv(4, 6), nn.Flatten()], "1", "cannot be run"),
    "Upsample": ([conv(4, 6), R(), nn.Upsample(scale_factor=2), conv(6, 2)], "2", "cannot be run"),
    "ConvTranspose2d": ([nn.ConvTranspose2d(4, 6, 3, padding=1), R(), conv(6, 2)], "0", "cannot be run"),
    "Conv1d": ([nn.Conv1d(4, 6, 3, padding=1)], "0", "cannot be run"),
    "GroupNorm": ([conv(4, 6), nn.GroupNorm(2, 6), R(), conv(6, 2)], "1", "cannot be run"),
    "ModuleList": ([nn.ModuleList([conv(4, 6)])], "0", "cannot be run"),
    "adaptive pooling": ([conv(4, 6), R(), nn.AdaptiveAvgPool2d(4), conv(6, 2)], "2", "cannot be run"),
    "no ReLU between": ([conv(4, 6), conv(6, 2)], "1", "without a ReLU between; insert nn.ReLU()"),
    "no ReLU behind BatchNorm": ([conv(4, 6), norm(6), conv(6, 2)], "2", "without a ReLU between"),
    "only dropout between": ([conv(4, 6), nn.Dropout(), conv(6, 2)], "2", "without a ReLU between"),
    "ReLU first": ([R(), conv(4, 6)], "0", "stands in front of the first convolution"),
    "even kernel": ([nn.Conv2d(4, 6, 4, padding=2)], "0", "the kernel must be square and odd, got 4x4"),
    "oblong kernel": (
        [nn.Conv2d(4, 6, (3, 5), padding=(1, 2))],
        "0",
        "the kernel must be square and odd, got 3x5",
    ),
    "no padding": ([conv(4, 6), R(), nn.Conv2d(6, 2, 3)], "2", "the padding must be 'same' (1), got (0, 0)"),
    "too much padding": ([nn.Conv2d(4, 6, 3, padding=2)], "0", "the padding must be 'same' (1), got (2, 2)"),
    "padding 'valid'": (
        [nn.Conv2d(4, 6, 3, padding="valid")],
        "0",
        "the padding must be 'same' (1), got valid",
    ),
    "padding without the dilation": (
        [nn.Conv2d(4, 6, 3, padding=1, dilation=2)],
        "0",
        "the padding must be 'same' (2), got (1, 1)",
    ),
    "oblong stride": ([nn.Conv2d(4, 6, 3, (1, 2), 1)], "0", "the same in both directions"),
    "oblong dilation": ([nn.Conv2d(4, 6, 3, 1, (1, 2), (1, 2))], "0", "the same in both directions"),
    "groups": ([nn.Conv2d(4, 8, 3, padding=1, groups=2)], "0", "got groups=2"),
    "padding_mode": (
        [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")],
        "0",
        "padding_mode must be 'zeros', got 'reflect'",
    ),
    "BatchNorm without statistics": (
        [conv(4, 6), without_statistics(), R(), conv(6, 2)],
        "1",
        "no running statistics",
    ),
    "BatchNorm first": ([norm(4), conv(4, 6)], "0", "does not follow a convolution directly"),
    "BatchNorm behind the ReLU": (
        [conv(4, 6), R(), norm(6), conv(6, 2)],
        "2",
        "does not follow a convolution directly",
    ),
    "BatchNorm behind a pooling": (
        [conv(4, 6), R(), nn.MaxPool2d(2), norm(6), conv(6, 2)],
        "3",
        "does not follow a convolution directly",
    ),
    "BatchNorm twice": (
        [conv(4, 6), norm(6), norm(6), R(), conv(6, 2)],
        "2",
        "does not follow a convolution directly",
    ),
    "BatchNorm of another width": (
        [conv(4, 6), norm(5)],
        "1",
        "normalises 5 channels, but the convolution gives 6",
    ),
    "pooling in front of the ReLU": (
        [conv(4, 6), nn.MaxPool2d(2), R(), conv(6, 2)],
        "1",
        "move it behind the ReLU",
    ),
    "pooling behind BatchNorm": (
        [conv(4, 6), norm(6), nn.AvgPool2d(2), R(), conv(6, 2)],
        "2",
        "move it behind the ReLU",
    ),
    "two poolings": (
        [conv(4, 6), R(), nn.MaxPool2d(2), nn.AvgPool2d(2), conv(6, 2)],
        "3",
        "follows another pooling",
    ),
    "overlapping pooling": ([conv(4, 6), R(), nn.MaxPool2d(3, 2), conv(6, 2)], "2", "only square windows"),
    "padded pooling": ([conv(4, 6), R(), nn.MaxPool2d(2, padding=1), conv(6, 2)], "2", "only square windows"),
    "padded average": ([conv(4, 6), R(), nn.AvgPool2d(2, padding=1), conv(6, 2)], "2", "only square windows"),
    "oblong pooling": ([conv(4, 6), R(), nn.MaxPool2d((2, 3)), conv(6, 2)], "2", "only square windows"),
    "dilated pooling": (
        [conv(4, 6), R(), nn.MaxPool2d(2, dilation=2), conv(6, 2)],
        "2",
        "only square windows",
    ),
    "ceil_mode": ([conv(4, 6), R(), nn.MaxPool2d(2, ceil_mode=True), conv(6, 2)], "2", "only square windows"),
    "average with ceil_mode": (
        [conv(4, 6), R(), nn.AvgPool2d(2, ceil_mode=True), conv(6, 2)],
        "2",
        "only square windows",
    ),
    "divisor": (
        [conv(4, 6), R(), nn.AvgPool2d(2, divisor_override=3), conv(6, 2)],
        "2",
        "only square windows",
    ),
    "inside a nested Sequential": (
        [conv(4, 6), R(), nn.Sequential(conv(6, 5), nn.Tanh())],
        "2.1",
        "cannot be run",
    ),
    "a subclass with another forward": ([Doubled(4, 6, 3, padding=1), R(), conv(6, 2)], "0", ""),
    "a residual block": ([conv(4, 6), R(), Residual(conv(6, 6), R()), conv(6, 2)], "2", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_layer_and_the_cause(name: str) -> None:
    modules, layer, cause = REFUSED[name]
    with pytest.raises(ValueError, match=f"layer '{re.escape(layer)}'") as caught:
        EdgeProxy.from_sequential(nn.Sequential(*modules))
    assert cause in str(caught.value)


def test_layers_of_an_ordered_dict_are_named_by_their_names() -> None:
    network = nn.Sequential(OrderedDict(stem=conv(4, 6), act=nn.ReLU(), head=nn.Sequential(OrderedDict(out=nn.Tanh()))))
    with pytest.raises(ValueError, match=r"layer 'head\.out' \(Tanh\(\)\)"):
        EdgeProxy.from_sequential(network)


def test_a_pooling_at_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="ends in a pooling"):
        EdgeProxy.from_sequential(nn.Sequential(conv(4, 6), nn.ReLU(), nn.MaxPool2d(2)))


@pytest.mark.parametrize("modules", [[], [nn.Dropout()], [nn.Sequential()]], ids=["empty", "dropout", "nested"])
def test_a_network_without_a_convolution_is_refused(modules: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"holds no nn\.Conv2d"):
        EdgeProxy.from_sequential(nn.Sequential(*modules))


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 takes 5 channels, but layer 0 gives 6"):
        EdgeProxy.from_sequential(nn.Sequential(conv(4, 6), nn.ReLU(), conv(5, 2)))


@pytest.mark.parametrize(
    "network", [conv(4, 6), nn.ModuleList([conv(4, 6)]), [conv(4, 6)]], ids=lambda x: type(x).__name__
)
def test_what_is_no_sequential_is_refused(network: nn.Sequential) -> None:
    with pytest.raises(TypeError, match=f"expects an nn.Sequential, got {type(network).__name__}"):
        EdgeProxy.from_sequential(network)


def test_a_sequential_with_another_forward_is_refused_itself() -> None:
    with pytest.raises((TypeError, ValueError), match="Residual"):
        EdgeProxy.from_sequential(Residual(conv(4, 4), nn.ReLU(), conv(4, 4)))


def test_weights_that_are_not_finite_are_refused() -> None:
    last = conv(6, 2)
    with torch.no_grad():
        last.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1 holds weights that are not finite"):
        EdgeProxy.from_sequential(nn.Sequential(conv(4, 6), nn.ReLU(), last))


def test_options_are_checked_as_everywhere() -> None:
    network = nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 2))
    with pytest.raises(ValueError, match="tap must be one of 'pre', 'post', got 'mid'"):
        EdgeProxy.from_sequential(network, tap="mid")
    with pytest.raises(ValueError, match="the proxy has 2 layers, got 3"):
        EdgeProxy.from_sequential(network, layer_weights=(1, 1, 1))
    with pytest.raises(ValueError, match="distance must be one of"):
        EdgeProxy.from_sequential(network, distance="cosine")
