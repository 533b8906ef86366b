"""Proxy files: safetensors with everything that defines a result in the metadata."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import ProxyFileError
from ..files import atomic_path
from ..plain import whole_number
from .record import ProxyLayer, ProxyRecord

FORMAT = "semeda_fast.edge_proxy"
VERSION = 1
BUNDLED = Path(__file__).with_name("weights") / "universal.safetensors"


def save_record(proxy: ProxyRecord, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `proxy` to `path` in one step.

    Raises:
        FileExistsError: `path` exists and overwrite is False.
        OSError: the folder is missing or cannot be written to.
        ProxyFileError: `path` does not end in .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise ProxyFileError(f"proxies are stored as safetensors: {path} should end in .safetensors")
    description = {
        "layers": [asdict(layer) for layer in proxy.layers],
        "tap": proxy.tap,
        "distance": proxy.distance,
        "layer_weights": proxy.layer_weights,
        "scales": proxy.scales,
        "provenance": proxy.provenance,
        "quality": proxy.quality,
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "proxy": json.dumps(description, sort_keys=True),
    }
    tensors = {}
    for number, (weight, bias) in enumerate(zip(proxy.weights, proxy.biases, strict=True)):
        tensors[f"{number}.weight"], tensors[f"{number}.bias"] = weight.cpu(), bias.cpu()
    with atomic_path(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, metadata)


@_disable_current_modes()  # a mode for fake tensors, for one: values are read as they are
def load_record(path: str | os.PathLike[str]) -> ProxyRecord:
    """Read a proxy file; nothing in it is ever executed.

    Raises:
        FileNotFoundError: there is no such file.
        ProxyFileError: truncated, of another kind, pickled, of a newer version, or inconsistent.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no proxy file {file}; train one with `semeda-fast train-proxy`")
    if file.is_dir():
        raise ProxyFileError(f"{file} is a folder; expected a proxy file (*.safetensors)")
    with file.open("rb") as stream:
        start = stream.read(9)
    # The length of a safetensors header may begin as pickles do (640 is b"\x80\x02"), but then "{" follows.
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{":
        raise ProxyFileError(
            f"{file} is a pickle (torch.save), which can run code when loaded and is refused; load it yourself "
            "if you trust it, then EdgeProxy.from_sequential(network).save('proxy.safetensors')"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ProxyFileError(
            f"{file} is no readable safetensors file ({error}); it may be truncated: copy or train it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ProxyFileError(
            f"{file} is a safetensors file of another kind (format {metadata.get('format')!r}, expected {FORMAT!r}); "
            "pass a file written by EdgeProxy.save or `semeda-fast train-proxy`"
        )
    if metadata.get("version") != str(VERSION):
        raise ProxyFileError(
            f"{file} has proxy format version {metadata.get('version')}, this package reads {VERSION}; "
            "install the version of semeda-fast that wrote it"
        )
    try:
        return _build(json.loads(metadata["proxy"]), tensors)
    except Exception as error:  # whatever odd contents lead to: AttributeError, OverflowError, RecursionError
        raise ProxyFileError(f"{file} describes no valid proxy: {error!r}; train it again") from error


def _build(description: dict[str, Any], tensors: dict[str, Any]) -> ProxyRecord:
    layers = [ProxyLayer(**layer) for layer in description["layers"]]
    expected = {f"{number}.{kind}" for number in range(len(layers)) for kind in ("weight", "bias")}
    if set(tensors) != expected:
        raise ValueError(f"expected the tensors {sorted(expected)}, got {sorted(tensors)}")
    return ProxyRecord(
        layers,
        [tensors[f"{number}.weight"] for number in range(len(layers))],
        [tensors[f"{number}.bias"] for number in range(len(layers))],
        **{key: description[key] for key in ("tap", "distance", "layer_weights", "scales", "provenance", "quality")},
    )


@functools.lru_cache(maxsize=1)
def _bundled() -> ProxyRecord:
    return load_record(BUNDLED)


@_disable_current_modes()
def bundled_record(num_classes: int) -> ProxyRecord:
    """The bundled universal proxy for `num_classes` classes; a copy of its own for each call.

    Raises:
        ValueError: num_classes is outside 1..256.
    """
    universal = _bundled()
    most = universal.layers[0].in_channels
    num_classes = whole_number("num_classes", num_classes)
    if not 1 <= num_classes <= most:
        raise ValueError(
            f"the bundled proxy serves 1 to {most} classes, got num_classes={num_classes}; "
            "train one for more classes with train_proxy(masks, num_classes)"
        )
    return universal.slice_classes(num_classes)
