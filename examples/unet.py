"""Networks for examples/train.py: a small U-Net of our own, and anything `transformers` offers.

Both map images [N,3,H,W] to logits [N,C,H,W] of the same size.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from semeda_fast.errors import missing_extra


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) for images of any size.

    GroupNorm by default, because it looks at one image at a time: then two processes with half a batch each
    compute what one process computes with the whole batch. SiLU instead of ReLU, because it has no kink where
    rounding decides on the gradient: so the two stay together to 1e-6 instead of 1e-2.

    Args:
        num_classes: channels of the logits.
        width: channels at full resolution; they double with each halving of the resolution, up to 16 times `width`.
        depth: halvings of the resolution.
        norm: "group", or "batch", which learns faster from scratch.
    """

    def __init__(self, num_classes: int, width: int = 16, depth: int = 3, norm: str = "group"):
        super().__init__()
        widths = [width * 2 ** min(level, 4) for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(high, low, norm) for high, low in pairwise([3, *widths]))
        self.up = nn.ModuleList(_block(low + high, high, norm) for high, low in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] -> logits [N,C,H,W]."""
        x, skips = images, []
        for level, block in enumerate(self.down):
            if level > 0:
                x = nn.functional.max_pool2d(x, 2, ceil_mode=True)  # ceil: works down to 1x1
            x = block(x)
            skips.append(x)
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        return self.head(x)


class HubNetwork(nn.Module):
    """A semantic-segmentation network of `transformers`, its logits scaled up to the size of the images."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] -> logits [N,C,H,W]."""
        logits = self.network(pixel_values=images).logits
        return interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def build_network(name: str, num_classes: int, *, width: int = 16, depth: int = 3, norm: str = "group") -> nn.Module:
    """The network that `--network NAME` asks for. Nothing is ever downloaded.

    Args:
        name: "unet"; or a model type of `transformers` such as "segformer" or "mobilenet_v2" (default
            configuration, random weights); or a configuration file (.json), or a folder with a config.json
            (random weights), or such a folder with model.safetensors (these weights, with a fresh head if
            its class count differs).
        num_classes: channels of the logits.
        width, depth, norm: of the U-Net.

    Raises:
        ValueError: no such network, or a configuration that transformers refuses.
        MissingExtraError: `transformers` is needed and not installed.
    """
    if name == "unet":
        return UNet(num_classes, width, depth, norm)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    try:
        from transformers import AutoConfig, AutoModelForSemanticSegmentation
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise missing_extra(f"--network {name}", "transformers", "test") from None
    path = Path(name)
    try:
        if (path / "model.safetensors").is_file():
            network = AutoModelForSemanticSegmentation.from_pretrained(
                path,
                num_labels=num_classes,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
            )
            return HubNetwork(network)
        settings = _read_config(path)
        model_type = settings.pop("model_type", name)
        if model_type not in _known_types():
            raise ValueError("transformers has no semantic-segmentation network of this type")
        for old in ("id2label", "label2id", "num_labels"):
            settings.pop(old, None)
        config = AutoConfig.for_model(model_type, **settings, num_labels=num_classes)
        return HubNetwork(AutoModelForSemanticSegmentation.from_config(config))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(_explain(name, error)) from error


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in a .json file or a folder's config.json; {} for the name of a model type."""
    file = path / "config.json" if path.is_dir() else path
    if not path.is_dir() and path.suffix != ".json":
        return {}
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"{file} is no transformers configuration: it has no 'model_type'")
    return settings


def _known_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

    return sorted(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)


def _explain(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot build --network {name}: {reason}; expected 'unet', a model type of transformers "
        f"({', '.join(_known_types())}), a configuration file (.json) or a local folder with a config.json"
    )


def _block(channels_in: int, channels_out: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [
            nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out) if norm == "batch" else nn.GroupNorm(math.gcd(8, channels_out), channels_out),
            nn.SiLU(inplace=True),
        ]
    return nn.Sequential(*layers)
