"""Segmentation networks for whole training steps: of `transformers`, from configurations, with random weights.

Nothing is downloaded. Each maps images [N,3,H,W] to logits [N,C,H,W]: what a network leaves at a fraction of the
resolution is scaled up bilinearly, as training scripts do before the loss.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Network:
    """One network of the suite.

    Attributes:
        name, title: in results and in tables.
        package: what has to be installed.
        make: (C, (H, W), tiny) -> a module whose output is logits, or holds them; `tiny` for trials.
        square: whether it takes square images only.
        full_size: whether it scales its logits up itself.
    """

    name: str
    title: str
    package: str
    make: Callable[[int, tuple[int, int], bool], nn.Module]
    square: bool = False
    full_size: bool = False

    def why_not(self) -> str:
        """Why it cannot be built here; "" where it can."""
        missing = importlib.util.find_spec(self.package) is None
        return f"{self.title} needs {self.package}, which is not installed" if missing else ""


class Scaled(nn.Module):
    """A network whose logits are scaled up to the size of its images."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def small(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] -> logits [N,C,h,w], in the size and memory order in which the network gives them."""
        out: Any = self.network(images)
        logits: Tensor = out.logits if hasattr(out, "logits") else out["out"]
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] -> logits [N,C,H,W]."""
        return scaled_up(self.small(images), (images.shape[-2], images.shape[-1]))


def scaled_up(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at the size (H, W), bilinearly."""
    if logits.shape[-2:] == size:
        return logits
    return interpolate(logits, size=size, mode="bilinear", align_corners=False)


def build(name: str, num_classes: int, size: tuple[int, int], *, tiny: bool = False) -> Scaled:
    """A network of NETWORKS in training mode, with the same random weights on every machine.

    Args:
        size: (H, W) of the images.
        tiny: a few thousand weights in the place of millions, for trials.

    Raises:
        ValueError: an unknown name, or a size that the network does not take.
        ImportError: its package is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    network = NETWORKS[name]
    if network.square and size[0] != size[1]:
        raise ValueError(f"{network.title} takes square images, got {size[0]}x{size[1]}")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scaled = Scaled(network.make(num_classes, size, tiny))
        scaled.train()
        return scaled


def _from_config(model_type: str, **settings: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    config = AutoConfig.for_model(model_type, **settings)
    network: nn.Module = AutoModelForSemanticSegmentation.from_config(config)
    return network


def _mobilenet(num_classes: int, size: tuple[int, int], tiny: bool) -> nn.Module:
    """MobileNetV2 with the DeepLabV3+ head, logits at 1/32; Sandler et al., CVPR 2018."""
    small = {"depth_multiplier": 0.25} if tiny else {}
    return _from_config("mobilenet_v2", num_labels=num_classes, **small)


def _segformer(num_classes: int, size: tuple[int, int], tiny: bool) -> nn.Module:
    """SegFormer-B0, logits at 1/4 in channels_last; Xie et al., NeurIPS 2021."""
    small = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    return _from_config("segformer", num_labels=num_classes, **(small if tiny else {}))


def _upernet(num_classes: int, size: tuple[int, int], tiny: bool) -> nn.Module:
    """UPerNet on ResNet-50, with its auxiliary head; Xiao et al., ECCV 2018."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    small = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    backbone = {"model_type": "resnet", "out_features": stages, **(small if tiny else {})}
    head = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 24} if tiny else {}
    return _from_config("upernet", backbone_config=backbone, num_labels=num_classes, **head)


def _dpt(num_classes: int, size: tuple[int, int], tiny: bool) -> nn.Module:
    """DPT on a ViT-S/16; Ranftl et al., ICCV 2021."""
    width, layers, heads = (24, 4, 2) if tiny else (384, 12, 6)
    return _from_config(
        "dpt",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size[0],
        backbone_out_indices=[layers * (i + 1) // 4 - 1 for i in range(4)],
        neck_hidden_sizes=[8, 8, 16, 16] if tiny else [48, 96, 192, 384],
        fusion_hidden_size=16 if tiny else 128,
        use_auxiliary_head=False,
        is_hybrid=False,
        num_labels=num_classes,
    )


def _deeplab(num_classes: int, size: tuple[int, int], tiny: bool) -> nn.Module:
    """DeepLabV3 on ResNet-101, logits at 1/8; Chen et al., arXiv 1706.05587, the paper's network."""
    segmentation = importlib.import_module("torchvision.models.segmentation")
    make = segmentation.deeplabv3_resnet50 if tiny else segmentation.deeplabv3_resnet101
    network: nn.Module = make(weights=None, weights_backbone=None, num_classes=num_classes)
    return network


NETWORKS = {
    network.name: network
    for network in (
        Network("mobilenet_v2", "MobileNetV2-DeepLabV3+", "transformers", _mobilenet),
        Network("segformer_b0", "SegFormer-B0", "transformers", _segformer),
        Network("upernet_resnet50", "UPerNet-ResNet-50", "transformers", _upernet, full_size=True),
        Network("dpt_small", "DPT-ViT-S", "transformers", _dpt, square=True, full_size=True),
        Network("deeplab_resnet101", "DeepLabV3-ResNet-101", "torchvision", _deeplab),
    )
}
CPU_NETWORKS = ("segformer_b0", "upernet_resnet50", "mobilenet_v2", "dpt_small")
GPU_NETWORKS = ("deeplab_resnet101", *CPU_NETWORKS)
