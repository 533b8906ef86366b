"""What the fused CPU backend keeps for backward: codes of 2 or 3 bits a feature, and nothing where none comes."""

from __future__ import annotations

import pytest
import torch
from helpers import components
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends import cpu
from semeda_fast.backends import registry as backends
from semeda_fast.backends.config import FusedConfig
from semeda_fast.backends.fused import FusedOps
from semeda_fast.backends.native import native_module
from semeda_fast.backends.problem import Outputs

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)
TAPS = ("pre", "post")
DISTANCES = ("l1", "l2", "smooth_l1")


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("width", [1, 16, 17, 512])
def test_python_and_the_kernels_agree_on_what_is_saved(tap: str, distance: str, width: int) -> None:
    for layers in ([(16, 3), (32, 3), (2, 3)], [(3, 5), (2, 1)], [(1, 3)] * 8):
        params = native_module().LossParams()
        params.n, params.h, params.w, params.classes = 1, 1, width, 4
        params.tap, params.distance = TAPS.index(tap), DISTANCES.index(distance)
        before = 4
        for out, size in layers:
            params.add_layer(out, before, size, 1.0, 1.0)
            before = out
        channels = [out for out, _ in layers]
        assert cpu.code_bytes(channels, width, tap, distance) == params.code_bytes_per_row()
        assert cpu.saved_floats(channels, width, distance) == params.saved_floats_per_row()


def saved_bytes(logits: Tensor, target: Tensor, proxy: EdgeProxy) -> int:
    """Bytes that autograd keeps for backward beyond the inputs and the proxy."""
    known = {t.data_ptr() for t in (logits, target, *proxy.weights, *proxy.biases)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = components(logits, target, proxy, backend="cpu").loss
    assert loss.requires_grad == (logits.requires_grad and torch.is_grad_enabled())
    return sum(kept.values())


def test_at_most_24_bytes_a_pixel_are_saved() -> None:
    proxy = EdgeProxy(21)
    logits, target = torch.randn(1, 21, 8, 512, requires_grad=True), torch.randint(0, 21, (1, 8, 512))
    saved = saved_bytes(logits, target, proxy)
    # 3 bits a feature of the first two layers, 2 of the last; besides, the proxy's parameters in one tensor, whatever
    # the image's size, and a few scalars of the division by V.
    parameters = sum(4 * t.numel() for t in (*proxy.weights, *proxy.biases))
    assert 18.5 * 8 * 512 <= saved - parameters <= 18.5 * 8 * 512 + 64
    assert saved - parameters <= 24 * target.numel()


def test_nothing_is_saved_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    outputs = FusedOps.outputs

    def watched(self: FusedOps, logits: Tensor, target: Tensor, config: FusedConfig, save: bool) -> Outputs:
        asked.append(save)
        return outputs(self, logits, target, config, save)

    monkeypatch.setattr(FusedOps, "outputs", watched)
    proxy = EdgeProxy(3)
    logits, target = torch.randn(1, 3, 8, 64), torch.randint(0, 3, (1, 8, 64))
    assert saved_bytes(logits, target, proxy) == 0
    with torch.no_grad():
        assert saved_bytes(logits.requires_grad_(), target, proxy) == 0
    assert asked == [False, False]
    assert saved_bytes(logits, target, proxy) > 0
    assert asked == [False, False, True]
