"""Tensors that are freed, resized or exchanged around backward: an error that names them, never a dead process.

The reference keeps copies of its own, so there the gradient of the forward that was is right, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Case
from helpers import VOID, components, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import semeda_loss

Change = Callable[[Tensor], None]


def _exchanged(make: Callable[[Tensor], Tensor]) -> Change:
    def change(tensor: Tensor) -> None:
        tensor.data = make(tensor.detach())

    return change


def _other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to({torch.float32: torch.bfloat16, torch.bool: torch.uint8}.get(tensor.dtype, torch.uint8))


def _resized(num_bytes: Callable[[int], int]) -> Change:
    def change(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storage.resize_(num_bytes(storage.nbytes()))

    return change


CHANGES: dict[str, Change] = {
    "fewer": _exchanged(lambda tensor: tensor[:1].clone()),
    "more": _exchanged(lambda tensor: torch.cat([tensor] * 3)),
    "narrower": _exchanged(lambda tensor: tensor[..., :-2].clone()),
    "dtype": _exchanged(_other_dtype),
    "freed": _resized(lambda size: 0),
    "cut": _resized(lambda size: size - 8),
}
NAMES = ("logits", "target", "valid_mask", "weight")
WAYS = ("short", "general")  # one where a backend has no short way


class Call:
    """One loss with every tensor that it may have, ready for backward."""

    def __init__(self, case: Case, way: str, copies: bool = False, validate: str = "auto") -> None:
        logits, target = make_inputs(n=2, h=6, w=9, device=case.device)
        generator = torch.Generator().manual_seed(3)
        valid = torch.rand(target.shape, generator=generator).to(case.device) > 0.2
        weight = (torch.rand(5, generator=generator) + 0.5).to(case.device)
        self.tensors = {"logits": logits, "target": target, "valid_mask": valid, "weight": weight}
        self.logits = logits
        used = {name: tensor.clone() if copies else tensor for name, tensor in self.tensors.items()}
        options: dict[str, Any] = {"ignore_index": VOID, "backend": case.backend, "validate": validate, **used}
        proxy = make_proxy().to(case.device)
        z, y = options.pop("logits"), options.pop("target")
        if way == "short":
            loss = semeda_loss(z, y, proxy, **options)
            assert isinstance(loss, Tensor)
            self.loss = loss
        else:
            self.loss = components(z, y, proxy, **options).loss

    def gradient(self) -> Tensor:
        self.loss.backward()
        assert self.logits.grad is not None
        return self.logits.grad

    def saved(self) -> tuple[Tensor, ...]:
        """What our own node of the graph keeps."""
        todo: list[Any] = [self.loss.grad_fn]
        for node in todo:
            if hasattr(node, "saved_tensors"):
                return tuple(node.saved_tensors)
            todo += [before for before, _ in node.next_functions if before is not None]
        raise AssertionError("no node of ours")


def expect_an_error(case: Case, call: Call, expected: Tensor, name: str) -> None:
    """Backward's error names the tensor; the reference may also give the gradient as it was."""
    if case.backend == "reference":
        try:
            found = call.gradient()
        except RuntimeError:
            return
        torch.testing.assert_close(found, expected)
        return
    with pytest.raises(RuntimeError, match=f"{name}.* changed between forward and backward.*clone"):
        call.gradient()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_change_before_backward_is_an_error(case: Case, name: str, change: str, way: str) -> None:
    expected = Call(case, way).gradient()
    call = Call(case, way)
    CHANGES[change](call.tensors[name])
    expect_an_error(case, call, expected, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_may_be_changed_instead(case: Case, name: str, change: str, way: str) -> None:
    """What the error advises."""
    expected = Call(case, way).gradient()
    call = Call(case, way, copies=True)
    before = call.tensors[name].detach().clone()
    CHANGES[change](call.tensors[name])
    if name == "logits":  # the leaf that the gradient is for
        call.logits.data = before
    assert torch.equal(call.gradient(), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", ["freed", "cut"])
def test_what_forward_kept_is_gone(case: Case, change: str, way: str) -> None:
    if case.backend == "reference":
        pytest.skip("what torch's own nodes keep is torch's")
    call = Call(case, way)
    kept = [tensor for tensor in call.saved() if tensor.dtype == torch.uint8]
    assert kept
    for tensor in kept:
        CHANGES[change](tensor)
    with pytest.raises(RuntimeError, match=r"forward kept.* changed between forward and backward.*storage has"):
        call.gradient()


GIVEN_BACK: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer": lambda tensor: tensor[:-1].clone(),
    "more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "flat": lambda tensor: tensor.reshape(-1, 1).clone(),
    "dtype": lambda tensor: tensor.to(torch.float16 if tensor.dtype == torch.float32 else torch.int16),
    "meta": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", [*GIVEN_BACK, "empty"])
def test_hooks_that_give_back_something_else(case: Case, what: str, way: str) -> None:
    """Each of the tensors that are saved, one after the other."""
    if case.backend == "reference":
        pytest.skip("what torch's own nodes do with saved tensors is torch's")

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        number, tensor = packed
        if number != at or not tensor.numel():
            return tensor
        if what != "empty":
            return GIVEN_BACK[what](tensor)
        other = tensor.clone()
        other.untyped_storage().resize_(0)
        return other

    at = 0
    kinds = set()
    while True:
        packed: list[Tensor] = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> tuple[int, Tensor]:
            packed.append(tensor)
            return len(packed) - 1, tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            call = Call(case, way)
        if at == len(packed):
            break
        kind = packed[at].dtype, tuple(packed[at].shape)
        if packed[at].dim() and packed[at].numel():  # not a scalar of the division by V, nor nothing at all
            kinds.add(kind)
            with pytest.raises(RuntimeError, match="changed between forward and backward"):
                call.gradient()
        at += 1
    assert len(kinds) >= 5  # logits, target, mask, weight, and what forward kept


def test_hooks_may_lay_tensors_out_anew(case: Case) -> None:
    """Other strides and another place, but the same values: so does every offloading to disk or to the CPU."""
    expected = Call(case, "short").gradient()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.clone().to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
        call = Call(case, "short")
    torch.testing.assert_close(call.gradient(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_labels_that_are_no_class_any_more(case: Case, way: str) -> None:
    if case.backend == "reference":
        pytest.skip("it does not read the labels again")
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    call = Call(case, way)
    call.tensors["target"].data = torch.full_like(call.tensors["target"], 99)
    with pytest.raises(RuntimeError, match=r"target changed between forward and backward: .*outside \[0, 5\).*clone"):
        call.gradient()
    unchecked = Call(case, way, validate="never")
    unchecked.tensors["target"].data = torch.full_like(call.tensors["target"], 99)
    assert unchecked.gradient().isnan().any()


@pytest.mark.parametrize("way", WAYS)
def test_labels_overwritten_behind_autograds_back(way: str) -> None:
    """The CPU kernels count what they meet; on a GPU the gradient is NaN at such a pixel."""
    case = Case("cpu", "cpu")
    pytest.importorskip("semeda_fast._C")
    call = Call(case, way)
    call.tensors["target"].numpy()[0, 2, 3:] = -7
    call.tensors["valid_mask"].numpy()[0, 2, 3:] = True
    with pytest.raises(RuntimeError, match=r"target changed .*from -7 to -7, 6 of 108 pixels"):
        call.gradient()


@pytest.mark.parametrize("way", WAYS)
def test_valid_labels_in_their_place_are_not_seen(case: Case, way: str) -> None:
    """The gradient is then that of no loss, but nothing is read beside memory."""
    call = Call(case, way)
    call.tensors["target"].data = torch.zeros_like(call.tensors["target"])
    found = call.gradient()
    assert found.shape == call.logits.shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_a_storage_that_was_freed_before_forward(case: Case, name: str) -> None:
    if case.backend == "reference":
        pytest.skip("torch's own kernels would read what is not there")
    for way in WAYS:
        with pytest.raises((ValueError, RuntimeError), match=f"{name}|class_weight|valid"):
            _call_with_a_freed(case, name, way)


def _call_with_a_freed(case: Case, name: str, way: str) -> None:
    logits, target = make_inputs(n=1, h=4, w=4, void=0.0)
    tensors = {"valid_mask": torch.ones(1, 4, 4, dtype=torch.bool), "weight": torch.ones(5)}
    tensors = {key: tensor.to(case.device) for key, tensor in tensors.items()}
    tensors |= {"logits": logits.to(case.device), "target": target.to(case.device)}
    tensors[name].untyped_storage().resize_(0)
    z, y = tensors.pop("logits"), tensors.pop("target")
    run: Any = components if way == "general" else semeda_loss
    run(z, y, make_proxy().to(case.device), backend=case.backend, **tensors)
