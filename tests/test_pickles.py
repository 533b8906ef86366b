"""What a pickled criterion names: public classes alone, so that it outlives the code, and loads with weights_only."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, value_and_grad
from torch import nn
from training_fixtures import scenes

import semeda_fast
from semeda_fast import EdgeProxy, SemedaLoss, safe_globals, train_proxy
from semeda_fast.backends import prepared as eager

FOREIGN = {  # of Python and torch: what any module's pickle holds
    "builtins.set",
    "__builtin__.set",
    "collections.OrderedDict",
    "_codecs.encode",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
}


def used(criterion: SemedaLoss, device: str = "cpu") -> SemedaLoss:
    """After calls of several kinds, which leave behind what they prepared."""
    criterion = criterion.to(device)
    for size in (5, 9):
        criterion(*make_inputs(c=criterion.proxy.num_classes, h=size, device=device))
    return criterion


def plain() -> SemedaLoss:
    return SemedaLoss(make_proxy(), ignore_index=VOID)


def with_everything() -> SemedaLoss:
    return SemedaLoss(
        make_proxy(distance="l2", tap="post"),
        ignore_index=VOID,
        weight=torch.rand(NUM_CLASSES),
        lambda_semeda=torch.tensor(0.3),
        label_smoothing=np.float64(0.1),
        layer_weights=[1, 0, 2],
        reduction="sum",
        upsample="bilinear",
        validate="never",
    )


def bundled() -> SemedaLoss:
    return SemedaLoss(num_classes=NUM_CLASSES, ignore_index=VOID)


def trained() -> SemedaLoss:
    proxy = train_proxy(scenes(4, 24, NUM_CLASSES), num_classes=NUM_CLASSES, steps=2, progress=False)
    return SemedaLoss(proxy, ignore_index=VOID)


def imported() -> SemedaLoss:
    network = nn.Sequential(nn.Conv2d(NUM_CLASSES, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    return SemedaLoss(EdgeProxy.from_sequential(network), ignore_index=VOID)


MAKERS = (plain, with_everything, bundled, trained, imported)


def names_in(data: bytes) -> set[str]:
    """Everything that a pickle imports: a string of a module and one of a name before each STACK_GLOBAL, or GLOBAL."""
    found, strings, memo = set(), [], {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.add(argument.replace(" ", "."))
        elif "UNICODE" in opcode.name:
            strings.append(argument)
        elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if argument is None else argument] = strings[-1] if strings else ""
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            strings.append(memo.get(argument, ""))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
    return found


def is_public(name: str) -> bool:
    """Whether no part of it is private, and the nearest package offers it."""
    if any(part.startswith("_") for part in name.split(".")):
        return False
    module, _, attribute = name.rpartition(".")
    package = importlib.import_module(module)
    while package.__name__ != "semeda_fast" and attribute not in getattr(package, "__all__", ()):
        package = importlib.import_module(package.__name__.rpartition(".")[0])
    return attribute in package.__all__


def test_the_reader_of_pickles_sees_what_is_imported() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps([eager._Calls(), make_proxy().layers, eager._Calls()], protocol)
        assert {"semeda_fast.backends.prepared._Calls", "semeda_fast.proxy.record.ProxyLayer"} <= names_in(data)
    assert not is_public("semeda_fast.backends.prepared._Calls")
    assert not is_public("semeda_fast.backends.problem.Saved")
    assert is_public("semeda_fast.loss.SemedaLoss")
    assert is_public("semeda_fast.proxy.record.ProxyLayer")


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_only_public_classes_are_in_a_pickle(maker: Callable[[], SemedaLoss], protocol: int) -> None:
    criterion = used(maker())
    names = names_in(pickle.dumps(criterion, protocol))
    ours = {name for name in names if name.startswith("semeda_fast")}
    assert {name for name in ours if not is_public(name)} == set()
    several = {"semeda_fast.outputs.MultiScaleLoss"}
    assert ours | several == {f"{c.__module__}.{c.__qualname__}" for c in safe_globals()}
    assert names - ours <= FOREIGN


def test_what_calls_leave_behind_is_no_part_of_a_pickle_or_a_copy(case: Case) -> None:
    fresh = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    before = pickle.dumps(fresh)
    criterion = used(fresh, case.device)
    assert pickle.dumps(criterion) == before
    whole = copy.deepcopy(criterion)
    for made in (whole, whole.proxy, copy.copy(criterion), copy.copy(criterion.proxy)):
        assert not {"_calls", "_options"} & set(vars(made))


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_weights_only_loads_it(maker: Callable[[], SemedaLoss]) -> None:
    criterion = used(maker())
    file = io.BytesIO()
    torch.save({"criterion": criterion, "epoch": 3}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"semeda_fast\.loss\.SemedaLoss"):
        torch.load(file)
    file.seek(0)
    with torch.serialization.safe_globals(safe_globals()):
        loaded = torch.load(file, weights_only=True)["criterion"]
    assert type(loaded) is SemedaLoss
    logits, target = make_inputs()
    for ours, theirs in zip(
        value_and_grad(loaded, logits, target), value_and_grad(criterion, logits, target), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert repr(loaded) == repr(criterion)
    assert loaded.proxy.provenance == criterion.proxy.provenance
    assert loaded.proxy.quality == criterion.proxy.quality


def test_a_whole_model_with_the_loss_in_it_loads() -> None:
    model = nn.ModuleDict({"network": nn.Conv2d(3, NUM_CLASSES, 1), "criterion": used(plain())})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([*safe_globals(), nn.ModuleDict, nn.Conv2d]):
        loaded = torch.load(file, weights_only=True)
    logits, target = make_inputs()
    assert torch.equal(loaded["criterion"](logits, target), model["criterion"](logits, target))


def blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class AsBefore:
    """Pickles a module with all of its attributes, as versions did that kept what they had prepared."""

    def __init__(self, module: nn.Module, **more: Any) -> None:
        self.parts = blank, (type(module),), {**vars(module), **more}

    def __reduce__(self) -> Any:
        return self.parts


def test_what_calls_left_behind_is_dropped_on_loading() -> None:
    criterion = used(plain())
    calls = eager._Calls()
    old = AsBefore(criterion, _options=criterion._chosen())
    old.parts[2]["_modules"] = {"proxy": AsBefore(criterion.proxy, _calls=calls)}
    data = pickle.dumps(old)
    assert {"semeda_fast.backends.prepared._Calls", "semeda_fast.options.LossOptions"} <= names_in(data)
    loaded = pickle.loads(data)
    assert not {"_options", "_calls"} & {*vars(loaded), *vars(loaded.proxy)}
    logits, target = make_inputs()
    assert torch.equal(loaded(logits, target), criterion(logits, target))


def test_the_list_is_documented_and_public() -> None:
    assert "safe_globals" in semeda_fast.__all__
    assert "torch.serialization" in (safe_globals.__doc__ or "")
    assert all(is_public(f"{c.__module__}.{c.__qualname__}") for c in safe_globals())
