"""The proxies that recipes of the accuracy study name, made once a study: trained, changed, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from semeda_fast import EdgeProxy, train_proxy
from semeda_fast.proxy import MaskFolder, ProxyLayer
from semeda_fast.proxy.quality import measure_scales
from semeda_fast.proxy.universal import train_universal

CLASSES, VOID = 11, 11


def _masks(data: Path, part: str) -> MaskFolder:
    return MaskFolder(data / part / "masks")


def _camvid(data: Path, **options: object) -> EdgeProxy:
    """Trained on CamVid's training masks; layer scales and quality from its validation masks."""
    return train_proxy(_masks(data, "train"), CLASSES, ignore_index=VOID, val_masks=_masks(data, "val"), **options)  # type: ignore[arg-type]


def _camvid_plain(data: Path) -> EdgeProxy:
    """The same, from one-hot maps alone: no noise, no temperature."""
    return _camvid(data, noise=0.0, temperature=1e-3)


def _camvid_no_noise(data: Path) -> EdgeProxy:
    """The same as camvid without noise, at its usual temperature."""
    return _camvid(data, noise=0.0)


def _camvid_nearest(data: Path) -> EdgeProxy:
    """camvid-plain, with void pixels filled with the nearest label while it is trained."""
    return _camvid(data, noise=0.0, temperature=1e-3, void="nearest")


def _universal_plain(data: Path) -> EdgeProxy:
    """The bundled proxy, trained again from one-hot maps alone; its layer scales are of synthetic masks, too."""
    del data
    return train_universal(steps=3000, noise=0.0, temperature=1e-3).slice_classes(CLASSES)


def _post(data: Path) -> EdgeProxy:
    """The bundled proxy with its taps behind the ReLU, and the layer scales that these have."""
    bundled = EdgeProxy.bundled(CLASSES)
    moved = EdgeProxy.from_tensors(bundled.layers, bundled.weights, bundled.biases, tap="post")
    return moved.annotated(scales=measure_scales(moved, _masks(data, "val"), ignore_index=VOID))


def _identity(data: Path) -> EdgeProxy:
    """Sees single pixels only: with L2 its first layer's term is a Brier score, the control for structure."""
    layers = (ProxyLayer(CLASSES, CLASSES, 1), ProxyLayer(CLASSES, 2, 1))
    weights = [torch.eye(CLASSES)[:, :, None, None], torch.zeros(2, CLASSES, 1, 1)]
    biases = [torch.zeros(CLASSES), torch.zeros(2)]
    plain = EdgeProxy.from_tensors(layers, weights, biases, layer_weights=(1.0, 0.0))
    return plain.annotated(scales=measure_scales(plain, _masks(data, "val"), ignore_index=VOID))


PROXIES: dict[str, Callable[[Path], EdgeProxy]] = {
    "camvid": _camvid,
    "camvid-plain": _camvid_plain,
    "camvid-no-noise": _camvid_no_noise,
    "camvid-nearest": _camvid_nearest,
    "universal-plain": _universal_plain,
    "post": _post,
    "identity": _identity,
}


def proxy_path(folder: Path, name: str) -> Path:
    """Where a study keeps one of PROXIES."""
    return folder / "proxies" / f"{name}.safetensors"


def make_proxy(name: str, folder: Path, data: Path) -> Path:
    """Make it unless the study has it already; `data` is CamVid's folder."""
    path = proxy_path(folder, name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        PROXIES[name](data).save(path)
    return path
