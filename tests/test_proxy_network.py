"""EdgeProxy as a module: what it computes, what it refuses, and that nothing touches its weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.backends.fused import why_not_fused
from semeda_fast.proxy.record import ProxyLayer


def random_weights(
    layers: list[ProxyLayer], *, positive: bool = False, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases for these layers; positive ones keep every ReLU open."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.abs() + 0.1 if positive else values

    weights = [draw(x.out_channels, x.in_channels, x.kernel_size, x.kernel_size) for x in layers]
    return weights, [draw(x.out_channels) for x in layers]


def random_proxy(layers: list[ProxyLayer], *, positive: bool = False, seed: int = 0, **options: Any) -> EdgeProxy:
    return EdgeProxy.from_tensors(layers, *random_weights(layers, positive=positive, seed=seed), **options)


def maps(n: int, c: int, h: int, w: int, *, seed: int = 0) -> Tensor:
    return torch.softmax(3 * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- construction -----------------------------------------------------------------------------------------


def test_the_default_is_the_network_of_the_literature() -> None:
    proxy = EdgeProxy(21)
    assert [tuple(weight.shape) for weight in proxy.weights] == [
        (16, 21, 3, 3),
        (32, 16, 3, 3),
        (2, 32, 3, 3),
    ]
    assert [tuple(bias.shape) for bias in proxy.biases] == [(16,), (32,), (2,)]
    assert (proxy.num_classes, proxy.widths, proxy.edge_classes, proxy.num_layers) == (21, (16, 32), 2, 3)
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("pre", "l1", (1.0, 1.0, 1.0))
    assert proxy.layer_scales("l1") == (1.0, 1.0, 1.0)
    assert proxy.receptive_field == 7
    assert proxy.provenance == {"trained": False}
    assert all(weight.dtype == torch.float32 for weight in proxy.weights + proxy.biases)


def test_every_option_arrives() -> None:
    proxy = EdgeProxy(
        4,
        [5, 6, 7],
        edge_classes=3,
        kernel_size=5,
        tap="post",
        distance="smooth_l1",
        layer_weights=[0, 1, 2, 0.5],
    )
    shapes = [tuple(weight.shape) for weight in proxy.weights]
    assert shapes == [(5, 4, 5, 5), (6, 5, 5, 5), (7, 6, 5, 5), (3, 7, 5, 5)]
    assert (proxy.widths, proxy.edge_classes, proxy.num_layers) == ((5, 6, 7), 3, 4)
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("post", "smooth_l1", (0.0, 1.0, 2.0, 0.5))
    assert "4 -> 5 -> 6 -> 7 -> 3" in repr(proxy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "at least 1 channel, got 0"),
        ({"num_classes": -3}, "at least 1 channel, got -3"),
        ({"widths": (16, 0)}, "at least 1 channel, got 16 -> 0"),
        ({"edge_classes": 0}, "at least 1 channel, got 32 -> 0"),
        ({"kernel_size": 2}, "kernel_size must be odd and positive, got 2"),
        ({"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
        ({"tap": "both"}, "tap must be one of 'pre', 'post', got 'both'"),
        ({"distance": "L1"}, "distance must be one of 'l1', 'l2', 'smooth_l1', got 'L1'"),
        ({"layer_weights": (1, 1)}, "the proxy has 3 layers, got 2"),
        ({"layer_weights": (1, -1, 1)}, "finite and not negative"),
        ({"layer_weights": (1, float("nan"), 1)}, "finite and not negative"),
        ({"layer_weights": (1, float("inf"), 1)}, "finite and not negative"),
    ],
)
def test_the_constructor_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeProxy(**{"num_classes": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride and dilation must be at least 1, got 0 and 1"),
        ({"dilation": 0}, "stride and dilation must be at least 1, got 1 and 0"),
        ({"pool": 1}, "pool must be 0"),
        ({"pool": -1}, "pool must be 0"),
    ],
)
def test_a_layer_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyLayer(2, 3, **options)


def test_from_tensors_names_the_layer_and_both_shapes() -> None:
    layers = [ProxyLayer(2, 3), ProxyLayer(3, 2)]
    weights, biases = random_weights(layers)
    with pytest.raises(ValueError, match=r"layer 1: expected a weight of shape \(2, 3, 3, 3\).*got \(2, 3, 5, 5\)"):
        EdgeProxy.from_tensors(layers, [weights[0], torch.zeros(2, 3, 5, 5)], biases)
    with pytest.raises(ValueError, match=r"layer 0: .* bias of \(3,\), got \(3, 2, 3, 3\) and \(4,\)"):
        EdgeProxy.from_tensors(layers, weights, [torch.zeros(4), biases[1]])
    with pytest.raises(ValueError, match="layer 1 takes 4 channels, but layer 0 gives 3"):
        random_proxy([ProxyLayer(2, 3), ProxyLayer(4, 2)])
    with pytest.raises(ValueError, match="at least one layer"):
        EdgeProxy.from_tensors([], [], [])
    with pytest.raises(ValueError, match=r"shorter|weights"):
        EdgeProxy.from_tensors(layers, weights[:1], biases)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_from_tensors_refuses_weights_that_are_not_finite(value: float) -> None:
    layers = [ProxyLayer(2, 3), ProxyLayer(3, 2)]
    weights, biases = random_weights(layers)
    weights[1][0, 2, 1, 1] = value
    with pytest.raises(ValueError, match="layer 1 holds weights that are not finite"):
        EdgeProxy.from_tensors(layers, weights, biases)
    weights, biases = random_weights(layers)
    biases[0][2] = value
    with pytest.raises(ValueError, match="layer 0 holds weights that are not finite"):
        EdgeProxy.from_tensors(layers, weights, biases)


def test_from_tensors_refuses_float64_weights_that_overflow_float32() -> None:
    layer = ProxyLayer(1, 1, 1)
    with pytest.raises(ValueError, match="layer 0 holds weights that are not finite"):
        EdgeProxy.from_tensors([layer], [torch.full((1, 1, 1, 1), 1e300, dtype=torch.float64)], [torch.zeros(1)])


@pytest.mark.parametrize(
    "scales",
    [
        {"l1": (1.0,)},
        {"l1": (1.0, 0.0)},
        {"l1": (1.0, -1.0)},
        {"l1": (1.0, float("nan"))},
        {"l3": (1.0, 1.0)},
    ],
)
def test_from_tensors_refuses_bad_scales(scales: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="scales must map a distance to 2 positive numbers"):
        random_proxy([ProxyLayer(2, 3), ProxyLayer(3, 2)], scales=scales)


def test_layer_scales_fall_back_to_one_for_a_distance_without_any() -> None:
    proxy = random_proxy([ProxyLayer(2, 3), ProxyLayer(3, 2)], scales={"l2": (0.5, 3.0)})
    assert proxy.layer_scales("l2") == (0.5, 3.0)
    assert proxy.layer_scales("l1") == (1.0, 1.0)


def test_from_tensors_copies() -> None:
    layers = [ProxyLayer(2, 3), ProxyLayer(3, 2)]
    weights, biases = random_weights(layers)
    provenance: dict[str, Any] = {"a": 1}
    proxy = EdgeProxy.from_tensors(layers, weights, biases, provenance=provenance)
    before = proxy.weights[0].clone()
    weights[0].zero_()
    provenance["a"] = 2
    assert torch.equal(proxy.weights[0], before)
    assert proxy.provenance == {"a": 1}


def test_weights_that_require_a_gradient_come_in_without_it() -> None:
    layers = [ProxyLayer(2, 3), ProxyLayer(3, 2)]
    weights, biases = random_weights(layers)
    proxy = EdgeProxy.from_tensors(layers, [weight.requires_grad_() for weight in weights], biases)
    assert not any(weight.requires_grad for weight in proxy.weights)


def test_the_seed_decides_the_initial_weights() -> None:
    first, again, other = EdgeProxy(5, seed=3), EdgeProxy(5, seed=3), EdgeProxy(5, seed=4)
    for a, b, c in zip(first.weights, again.weights, other.weights, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first.weights[1][0], first.weights[1][1])


def test_construction_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    EdgeProxy(5)
    assert torch.equal(torch.get_rng_state(), state)


# --- what it computes -------------------------------------------------------------------------------------


def as_sequential(proxy: EdgeProxy) -> nn.Sequential:
    """The same network of torch's own modules."""
    modules: list[nn.Module] = []
    for layer, weight, bias in zip(proxy.layers, proxy.weights, proxy.biases, strict=True):
        if layer.pool > 1:
            modules.append(nn.MaxPool2d(layer.pool))
        elif layer.pool < -1:
            modules.append(nn.AvgPool2d(-layer.pool))
        padding = (layer.kernel_size - 1) * layer.dilation // 2
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            padding,
            dilation=layer.dilation,
        )
        conv.load_state_dict({"weight": weight, "bias": bias})
        modules += [conv, nn.ReLU()]
    return nn.Sequential(*modules)


STACKS = {
    "default": [ProxyLayer(4, 16), ProxyLayer(16, 32), ProxyLayer(32, 2)],
    "one layer": [ProxyLayer(4, 3)],
    "kernels 1, 5, 7": [ProxyLayer(4, 3, 1), ProxyLayer(3, 5, 5), ProxyLayer(5, 2, 7)],
    "dilations": [ProxyLayer(4, 3, 3, 1, 2), ProxyLayer(3, 5, 5, 1, 3), ProxyLayer(5, 2)],
    "strides": [ProxyLayer(4, 3, 3, 2), ProxyLayer(3, 5, 5, 3), ProxyLayer(5, 2)],
    "pools": [ProxyLayer(4, 3), ProxyLayer(3, 5, pool=2), ProxyLayer(5, 2, pool=-3)],
    "pool first, stride, dilation": [ProxyLayer(4, 3, 3, 2, 2, 2), ProxyLayer(3, 2, 3, 1, 1, -2)],
}


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("name", STACKS)
def test_features_equal_those_of_torch_modules(name: str, tap: str) -> None:
    proxy = random_proxy(STACKS[name], tap=tap)
    x = maps(2, 4, 27, 31)
    expected, a = [], x
    with torch.no_grad():
        for module in as_sequential(proxy):
            a = module(a)
            if isinstance(module, nn.Conv2d if tap == "pre" else nn.ReLU):
                expected.append(a)
    features = proxy.features(x)
    assert len(features) == len(expected) == proxy.num_layers
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    if tap == "post":
        assert all((ours >= 0).all() for ours in features)
        assert any((ours == 0).any() for ours in features)  # the ReLU did something


def test_edge_logits_are_the_last_layer_before_its_relu_whatever_the_tap() -> None:
    x = maps(2, 4, 9, 11)
    pre, post = random_proxy(STACKS["default"], tap="pre"), random_proxy(STACKS["default"], tap="post")
    assert torch.equal(pre.edge_logits(x), pre.features(x)[-1])
    assert torch.equal(post.edge_logits(x), pre.edge_logits(x))
    assert torch.equal(post(x), pre.edge_logits(x))
    assert (post.edge_logits(x) < 0).any()
    assert torch.equal(post.features(x)[-1], pre.edge_logits(x).relu())


def test_double_input_is_computed_in_double() -> None:
    proxy = random_proxy(STACKS["default"])
    x = maps(1, 4, 9, 11).double()
    for fine, coarse in zip(proxy.features(x), proxy.features(x.float()), strict=True):
        assert fine.dtype == torch.float64
        torch.testing.assert_close(fine.float(), coarse, rtol=1e-4, atol=1e-4)
        assert not torch.equal(fine.float().double(), fine)


def test_the_gradient_reaches_the_probabilities_and_no_weight() -> None:
    proxy = random_proxy(STACKS["default"])
    x = maps(1, 4, 9, 11).requires_grad_()
    proxy.edge_logits(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in proxy.weights + proxy.biases)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 5, 8, 8), (4, 8, 8), (1, 2, 4, 8, 8)])
def test_another_shape_names_both_sides(shape: tuple[int, ...]) -> None:
    proxy = EdgeProxy(4)
    for call in (proxy.features, proxy.edge_logits, proxy):
        with pytest.raises(ValueError, match=r"\[N,4,H,W\], got \[" + ", ".join(map(str, shape))):
            call(torch.zeros(shape))


FIELDS = {
    "1x1": ([ProxyLayer(1, 1, 1)], 1),
    "default": ([ProxyLayer(1, 2), ProxyLayer(2, 2), ProxyLayer(2, 1)], 7),
    "kernel 5 and 7": ([ProxyLayer(1, 2, 5), ProxyLayer(2, 1, 7)], 11),
    "dilations 2 and 3": ([ProxyLayer(1, 2, 3, 1, 2), ProxyLayer(2, 1, 3, 1, 3)], 11),
    "stride 2 then 3x3": ([ProxyLayer(1, 2, 3, 2), ProxyLayer(2, 1)], 7),
    "strides 2 and 2": ([ProxyLayer(1, 2, 3, 2), ProxyLayer(2, 2, 3, 2), ProxyLayer(2, 1)], 15),
    "max-pool 2": ([ProxyLayer(1, 2), ProxyLayer(2, 1, pool=2)], 8),
    "average-pool 3 first": ([ProxyLayer(1, 2, pool=-3), ProxyLayer(2, 1)], 15),
    "stride, dilation, pool": ([ProxyLayer(1, 2, 3, 2), ProxyLayer(2, 1, 3, 1, 2, 2)], 21),
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_receptive_field_is_what_a_perturbation_shows(name: str) -> None:
    layers, expected = FIELDS[name]
    proxy = random_proxy(layers, positive=True)
    size = 44
    images = torch.zeros(size, 1, 1, size)  # image i has pixel i of a row set; by symmetry the columns need no test
    images[range(size), 0, 0, range(size)] = 1.0
    images = images.expand(-1, -1, size, -1)
    clean = proxy.edge_logits(torch.zeros(1, 1, size, size))
    middle = clean.shape[2] // 2
    seen = (proxy.edge_logits(images) - clean)[:, 0, middle, middle].abs() > 1e-4
    first, last = int(seen.nonzero().min()), int(seen.nonzero().max())
    assert 0 < first < last + 1 < size  # the image is larger than the field
    assert last - first + 1 == proxy.receptive_field == expected


def test_one_pixel_changes_exactly_the_field_around_it() -> None:
    proxy = random_proxy([ProxyLayer(1, 2, 5), ProxyLayer(2, 2, 3, 1, 2), ProxyLayer(2, 1)], positive=True)
    x = torch.zeros(1, 1, 25, 25)
    clean = proxy.edge_logits(x)
    x[0, 0, 11, 13] = 1.0
    changed = (proxy.edge_logits(x) != clean)[0, 0].nonzero()
    reach = proxy.receptive_field // 2
    assert changed.min(dim=0).values.tolist() == [11 - reach, 13 - reach]
    assert changed.max(dim=0).values.tolist() == [11 + reach, 13 + reach]


# --- slicing ----------------------------------------------------------------------------------------------


def test_slicing_equals_feeding_zeros_to_the_classes_cut_off() -> None:
    proxy = random_proxy([ProxyLayer(6, 5, 5, 1, 2), ProxyLayer(5, 2)], tap="post")
    x = maps(2, 4, 9, 11)
    wide = torch.cat([x, torch.zeros(2, 2, 9, 11)], dim=1)
    cut = proxy.slice_classes(4)
    assert cut.num_classes == 4
    for ours, theirs in zip(cut.features(x), proxy.features(wide), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_slicing_keeps_everything_else_and_leaves_the_original_alone() -> None:
    proxy = random_proxy(
        [ProxyLayer(6, 5, 5, 2, 3, 2), ProxyLayer(5, 2)],
        tap="post",
        distance="l2",
        layer_weights=(0.5, 2.0),
        scales={"l2": (2.0, 3.0)},
        provenance={"trained": True},
        quality={"edge_f1": 0.5},
    )
    before = [tensor.clone() for tensor in proxy.weights + proxy.biases]
    cut = proxy.slice_classes(1)
    assert cut.layers == (ProxyLayer(1, 5, 5, 2, 3, 2), ProxyLayer(5, 2))
    assert (cut.tap, cut.distance, cut.layer_weights) == ("post", "l2", (0.5, 2.0))
    assert (cut.scales, cut.quality) == ({"l2": (2.0, 3.0)}, {"edge_f1": 0.5})
    assert cut.provenance == {"trained": True, "sliced_from_classes": 6}
    for buffer in cut.buffers():
        buffer.zero_()
    cut.quality["edge_f1"] = 0.0
    assert proxy.num_classes == 6
    assert proxy.quality == {"edge_f1": 0.5}
    assert all(torch.equal(a, b) for a, b in zip(proxy.weights + proxy.biases, before, strict=True))


@pytest.mark.parametrize("count", [0, -1, 7])
def test_slicing_to_an_impossible_count_names_both(count: int) -> None:
    with pytest.raises(ValueError, match=f"this proxy has 6 classes; cannot cut it to {count}"):
        EdgeProxy(6).slice_classes(count)


def test_slicing_to_all_classes_changes_no_feature() -> None:
    proxy = random_proxy(STACKS["default"])
    x = maps(1, 4, 7, 7)
    assert torch.equal(proxy.slice_classes(4).edge_logits(x), proxy.edge_logits(x))


# --- facts about it ----------------------------------------------------------------------------------------


def test_an_annotated_copy_differs_in_what_was_given_and_in_nothing_else() -> None:
    facts: dict[str, Any] = {
        "scales": {"l2": (2.0, 3.0)},
        "provenance": {"a": 1},
        "quality": {"edge_f1": 0.5},
    }
    proxy = random_proxy(
        [ProxyLayer(4, 5, 5, 2), ProxyLayer(5, 2)], tap="post", distance="l2", layer_weights=(0, 2), **facts
    )
    others: dict[str, Any] = {"scales": {"l1": (4.0, 5.0)}, "provenance": {"b": 2}, "quality": {}}
    for name, value in others.items():
        copied = proxy.annotated(**{name: value})
        assert {fact: getattr(copied, fact) for fact in facts} == {**facts, name: value}
        assert copied.layers == proxy.layers
        assert (copied.tap, copied.distance, copied.layer_weights) == ("post", "l2", (0.0, 2.0))
        for a, b in zip(copied.buffers(), proxy.buffers(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    assert {fact: getattr(proxy, fact) for fact in facts} == facts  # the original is as it was


# --- as a module ------------------------------------------------------------------------------------------


def everything(proxy: EdgeProxy) -> list[Tensor]:
    return [*proxy.weights, *proxy.biases]


def test_nothing_is_a_parameter_or_in_the_state_dict() -> None:
    proxy = EdgeProxy(5)
    holder = nn.Sequential(nn.Conv2d(3, 5, 1), proxy)
    assert list(proxy.parameters()) == []
    assert proxy.state_dict() == {}
    assert sorted(holder.state_dict()) == ["0.bias", "0.weight"]
    assert len(list(proxy.buffers())) == 6
    assert nn.Sequential(nn.Conv2d(3, 5, 1), EdgeProxy(5)).load_state_dict(holder.state_dict())


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "half then float": lambda m: m.half().float(),
    "type": lambda m: m.type(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside a model"])
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_leaves_every_bit_alone(name: str, inside: bool) -> None:
    proxy = random_proxy(STACKS["default"])
    before = [tensor.clone() for tensor in everything(proxy)]
    assert any(not torch.equal(tensor.half().float(), tensor) for tensor in before)  # a cast would show
    holder = nn.Sequential(nn.Linear(2, 2), proxy) if inside else proxy
    CASTS[name](holder)
    for now, then in zip(everything(proxy), before, strict=True):
        assert now.dtype == torch.float32
        assert torch.equal(now, then)


def test_moves_between_devices_pass_with_and_without_a_cast() -> None:
    proxy = random_proxy(STACKS["default"])
    for moved in (copy.deepcopy(proxy).to("meta"), copy.deepcopy(proxy).to("meta", torch.float16)):
        assert all(tensor.device.type == "meta" and tensor.dtype == torch.float32 for tensor in everything(moved))


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside a model"])
def test_to_empty_leaves_the_values_alone(inside: bool) -> None:
    """No checkpoint holds them, so what is materialised from the meta device would never get them back."""
    proxy = random_proxy(STACKS["default"])
    before = [tensor.clone() for tensor in everything(proxy)]
    with torch.device("meta"):
        holder = nn.Sequential(nn.Linear(2, 2), proxy) if inside else proxy
    holder.to_empty(device="cpu")
    for now, then in zip(everything(proxy), before, strict=True):
        assert torch.equal(now, then)
    assert not proxy.lost


def test_a_proxy_that_lost_its_values_says_so() -> None:
    criterion = SemedaLoss(random_proxy(STACKS["default"]))
    assert torch.isfinite(criterion(torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)))
    criterion.to("meta").to_empty(device="cpu")
    assert criterion.proxy.lost
    with pytest.raises(RuntimeError, match="on the meta device before to_empty"):
        criterion(torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8))


def test_train_eval_and_requires_grad_change_nothing() -> None:
    proxy = random_proxy(STACKS["default"])
    x = maps(1, 4, 7, 7)
    expected = proxy.edge_logits(x)
    for changed in (proxy.train(), proxy.eval(), proxy.requires_grad_(True)):
        assert torch.equal(changed.edge_logits(x), expected)
        assert not changed.edge_logits(x).requires_grad


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda proxy: pickle.loads(pickle.dumps(proxy))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(clone: Any) -> None:
    proxy = random_proxy(
        STACKS["dilations"],
        tap="post",
        distance="l2",
        layer_weights=(0, 1, 2),
        scales={"l1": (1.0, 2.0, 3.0)},
        provenance={"trained": True},
        quality={"edge_f1": 0.9},
    )
    twin = clone(proxy)
    assert twin.layers == proxy.layers
    for name in ("tap", "distance", "layer_weights", "scales", "provenance", "quality", "receptive_field"):
        assert getattr(twin, name) == getattr(proxy, name)
    for a, b in zip(everything(twin), everything(proxy), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    twin.half()
    assert all(tensor.dtype == torch.float32 for tensor in everything(twin))
    assert twin.state_dict() == {}
    twin.scales["l1"] = (9.0, 9.0, 9.0)
    assert proxy.layer_scales("l1") == (1.0, 2.0, 3.0)


# --- what the fused kernels take --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([ProxyLayer(4, 2)], "1 layers; the fused kernels take 2 to 8"),
        ([ProxyLayer(4, 4)] * 9, "9 layers; the fused kernels take 2 to 8"),
        ([ProxyLayer(4, 65), ProxyLayer(65, 2)], "layer 0 has 65 channels; the fused kernels take up to 64"),
        ([ProxyLayer(4, 8), ProxyLayer(8, 65)], "layer 1 has 65 channels; the fused kernels take up to 64"),
        ([ProxyLayer(4, 8), ProxyLayer(8, 2, stride=2)], "layer 1 has a stride, a dilation or a pooling"),
        ([ProxyLayer(4, 8, dilation=2), ProxyLayer(8, 2)], "layer 0 has a stride, a dilation or a pooling"),
        ([ProxyLayer(4, 8), ProxyLayer(8, 2, pool=2)], "layer 1 has a stride, a dilation or a pooling"),
        ([ProxyLayer(4, 8), ProxyLayer(8, 2, pool=-2)], "layer 1 has a stride, a dilation or a pooling"),
    ],
)
def test_why_not_fused_names_the_layer_and_the_limit(layers: list[ProxyLayer], message: str) -> None:
    proxy = random_proxy(layers)
    reason = proxy.why_not_fused()
    assert reason is not None
    assert message in reason
    again = why_not_fused(
        proxy.weights, [x.stride for x in layers], [x.dilation for x in layers], [x.pool for x in layers]
    )
    assert again is not None
    assert message in again


@pytest.mark.parametrize(
    "layers",
    [
        [ProxyLayer(256, 64), ProxyLayer(64, 64)],
        [ProxyLayer(4, 4)] * 8,
        [ProxyLayer(4, 4, 1), ProxyLayer(4, 4, 7)],
        [ProxyLayer(4, 16), ProxyLayer(16, 32), ProxyLayer(32, 2)],
    ],
)
def test_why_not_fused_is_none_within_the_limits(layers: list[ProxyLayer]) -> None:
    assert random_proxy(layers).why_not_fused() is None
