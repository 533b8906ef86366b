"""What users may import: a name that comes or goes is a decision, so the list stands here and not only in the code."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "semeda_fast": [
        "EdgeProxy",
        "LossCounts",
        "MultiScaleLoss",
        "SemedaLoss",
        "__version__",
        "backend_info",
        "safe_globals",
        "semeda_loss",
        "train_proxy",
    ],
    "semeda_fast.errors": [
        "BackendUnavailableError",
        "MaskFileError",
        "MissingExtraError",
        "ProxyFileError",
        "ProxyWarning",
    ],
    "semeda_fast.integrations.monai": ["MonaiLoss"],
    "semeda_fast.integrations.transformers": ["compute_loss_func", "count_whole_batches"],
    "semeda_fast.metrics": ["BoundaryF", "BoundaryIoU", "TrimapIoU"],
    "semeda_fast.proxy": [
        "EdgeProxy",
        "MaskFolder",
        "ProxyLayer",
        "SyntheticMasks",
        "edge_labels",
        "pair_files",
        "read_mask",
        "read_pair",
        "synthetic_mask",
        "train_proxy",
    ],
    "semeda_fast.schedule": ["ramp"],
}
# What public functions return: users read its fields and do not construct it.
RETURNED = {
    "semeda_fast.functional.LossComponents",
    "semeda_fast.outputs.MultiScaleComponents",
    "semeda_fast.backends.registry.BackendInfo",
    "semeda_fast.backends.registry.BackendStatus",
}
# `.. autoclass:: semeda_fast.EdgeProxy`, and the options below it.
DIRECTIVE = re.compile(r"^\.\. auto(class|function|module):: (\S+)\n((?:[ ]{3}:.*\n)*)", re.MULTILINE)


def load(module: str) -> ModuleType:
    if module == "semeda_fast.metrics":
        pytest.importorskip("torchmetrics")
    if module == "semeda_fast.integrations.transformers":
        pytest.importorskip("transformers")
    return importlib.import_module(module)


def documented() -> Iterator[object]:
    """Each object that a page of the reference shows."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for kind, name, options in DIRECTIVE.findall(page.read_text(encoding="utf-8") + "\n"):
            if kind != "module":
                module, _, attribute = name.rpartition(".")
                yield getattr(load(module), attribute)
            elif ":members:" in options:
                hidden = re.findall(r":exclude-members: (.*)", options)
                left_out = {word.strip() for line in hidden for word in line.split(",")} | {"__version__"}
                yield from (getattr(load(name), shown) for shown in load(name).__all__ if shown not in left_out)


def objects() -> dict[str, object]:
    """Every public object, once, by the name that a user writes."""
    found = {f"{module}.{name}": getattr(load(module), name) for module, names in PUBLIC.items() for name in names}
    return {name: value for name, value in found.items() if not name.endswith("__version__")}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    found = load(module)
    assert found.__all__ == PUBLIC[module]
    assert all(hasattr(found, name) for name in PUBLIC[module])
    assert not [name for name in found.__all__ if name.startswith("_") and name != "__version__"]


def test_each_is_on_one_page_of_the_reference_and_nothing_else_is() -> None:
    shown = Counter(id(value) for value in documented())
    returned = [getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in RETURNED]
    expected = {id(value): name for name, value in objects().items()}
    assert [name for key, name in expected.items() if shown[key] != 1] == []
    assert set(shown) == set(expected) | {id(value) for value in returned}


def members(cls: type) -> Iterator[tuple[str, object]]:
    """The methods and properties that a class of ours brings, itself or from a private base."""
    for base in cls.__mro__:
        if base.__module__.startswith("semeda_fast"):
            yield from ((name, value) for name, value in vars(base).items() if not name.startswith("_"))


def test_each_has_a_text_of_its_own() -> None:
    bare = []
    for name, value in objects().items():
        if not value.__doc__ or value.__doc__.startswith(f"{name.rpartition('.')[2]}("):  # what dataclass makes up
            bare.append(name)
        if isinstance(value, type):
            bare += [
                f"{name}.{member}"
                for member, found in members(value)
                if (inspect.isroutine(found) or isinstance(found, property))
                and not inspect.getdoc(getattr(value, member))
            ]
    assert bare == []


def test_a_module_of_public_names_hides_the_rest() -> None:
    """What errors.py and schedule.py define beside their public names is for this package alone."""
    own = {
        f"{module}.{name}"
        for module in ("semeda_fast.errors", "semeda_fast.schedule")
        for name, value in vars(load(module)).items()
        if getattr(value, "__module__", "") == module and name not in PUBLIC[module]
    }
    assert own == {"semeda_fast.errors.missing_extra"}
