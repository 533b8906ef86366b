"""Turning a trained nn.Sequential into the record of a proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .record import ProxyLayer, ProxyRecord

_INERT = (nn.Identity, nn.Dropout, nn.Dropout2d)  # nothing happens there in a frozen network


def from_sequential(
    network: nn.Sequential,
    *,
    tap: str = "pre",
    distance: str = "l1",
    layer_weights: Sequence[float] | None = None,
) -> ProxyRecord:
    """The proxy that computes what `network` computes in eval mode; layer scales are 1.

    Taken: nn.Conv2d with odd square kernels and zero "same" padding (any stride and dilation), each followed
    by nn.ReLU except the last, where it is optional; nn.BatchNorm2d directly after a convolution, folded
    into it; nn.MaxPool2d and nn.AvgPool2d whose stride is their window, in front of a convolution (after the
    ReLU); nn.Identity and dropout. Nested Sequentials are flattened.

    Raises:
        TypeError: `network` is no nn.Sequential.
        ValueError: a layer that cannot be run, by its name in `network`, and why.
    """
    if not isinstance(network, nn.Sequential):
        raise TypeError(f"from_sequential expects an nn.Sequential, got {type(network).__name__}")
    if _has_own_forward(network):
        raise TypeError(f"from_sequential expects a plain nn.Sequential; {type(network).__name__} has its own forward")
    layers: list[ProxyLayer] = []
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    state, pool = "relu", 0  # the kind of the last layer that did something, and the pooling it waits with
    for name, module in _flatten(network):
        where = f"layer {name!r} ({module})"
        if _has_own_forward(module):
            raise ValueError(f"{where} cannot be run: its class overrides the forward that it inherits")
        if isinstance(module, _INERT):
            continue
        if isinstance(module, nn.Conv2d):
            if state in ("conv", "norm"):
                raise ValueError(f"{where} follows a convolution without a ReLU between; insert nn.ReLU()")
            _check_convolution(module, where)
            layers.append(
                ProxyLayer(
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.stride[0],
                    module.dilation[0],
                    pool,
                )
            )
            weights.append(module.weight.detach().float())
            bias = (
                torch.zeros(module.out_channels, dtype=torch.float32)
                if module.bias is None
                else module.bias.detach().float()
            )
            biases.append(bias.to(module.weight.device))
            state, pool = "conv", 0
        elif isinstance(module, nn.BatchNorm2d):
            if state != "conv":
                raise ValueError(f"{where} does not follow a convolution directly, so it cannot be folded into one")
            weights[-1], biases[-1] = _fold(module, weights[-1], biases[-1], where)
            state = "norm"
        elif isinstance(module, nn.ReLU):
            if not layers:
                raise ValueError(f"{where} stands in front of the first convolution")
            state = "relu"
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            if state != "relu":
                raise ValueError(f"{where} stands between a convolution and its ReLU; move it behind the ReLU")
            if pool:
                raise ValueError(f"{where} follows another pooling; one window of the product's size does the same")
            pool = _pool(module, where)
        else:
            raise ValueError(
                f"{where} cannot be run: a proxy is made of nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, "
                "nn.AvgPool2d, nn.Identity and dropout"
            )
    if not layers:
        raise ValueError("the network holds no nn.Conv2d")
    if pool:
        raise ValueError(f"the network ends in a pooling ({pool}); remove it, no layer would see it")
    return ProxyRecord(
        layers,
        weights,
        biases,
        tap=tap,
        distance=distance,
        layer_weights=layer_weights,
        provenance={"trained": True, "source": "nn.Sequential"},
    )


def _flatten(network: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(): it leaves out the second appearance of a module.
    for name, module in network._modules.items():
        if isinstance(module, nn.Sequential) and not _has_own_forward(module):
            yield from _flatten(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _has_own_forward(module: nn.Module) -> bool:
    kinds = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, *_INERT)
    return any(isinstance(module, kind) and type(module).forward is not kind.forward for kind in kinds)


def _check_convolution(conv: nn.Conv2d, where: str) -> None:
    (height, width), dilation = conv.kernel_size, conv.dilation
    if height != width or height % 2 == 0:
        raise ValueError(f"{where}: the kernel must be square and odd, got {height}x{width}")
    if conv.stride[0] != conv.stride[1] or dilation[0] != dilation[1]:
        raise ValueError(f"{where}: stride and dilation must be the same in both directions")
    if conv.groups != 1:
        raise ValueError(f"{where}: grouped convolutions cannot be run, got groups={conv.groups}")
    if conv.padding_mode != "zeros":
        raise ValueError(f"{where}: padding_mode must be 'zeros', got {conv.padding_mode!r}")
    same = dilation[0] * (height // 2)
    if conv.padding != "same" and tuple(conv.padding) != (same, same):
        raise ValueError(f"{where}: the padding must be 'same' ({same}), got {conv.padding}")


def _fold(norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """conv followed by norm in eval mode as one convolution; computed in fp64, since it is done once."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{where} has no running statistics (track_running_stats=False), so it cannot be frozen")
    if norm.num_features != weight.shape[0]:
        raise ValueError(
            f"{where} normalises {norm.num_features} channels, but the convolution gives {weight.shape[0]}"
        )
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    folded_bias = (bias.double() - norm.running_mean.double()) * factor + shift
    return (weight.double() * factor.reshape(-1, 1, 1, 1)).float(), folded_bias.float()


def _pool(module: nn.MaxPool2d | nn.AvgPool2d, where: str) -> int:
    window, stride = module.kernel_size, module.stride
    size = window if isinstance(window, int) else window[0]
    plain = module.padding in (0, (0, 0)) and not module.ceil_mode and getattr(module, "dilation", 1) in (1, (1, 1))
    if isinstance(module, nn.AvgPool2d):
        plain = plain and module.divisor_override is None
    if window not in (size, (size, size)) or stride not in (size, (size, size)) or not plain:
        raise ValueError(f"{where}: only square windows with the same stride, no padding and floor mode can be run")
    if size == 1:
        return 0
    return size if isinstance(module, nn.MaxPool2d) else -size
