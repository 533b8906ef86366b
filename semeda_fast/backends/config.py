"""What the operators of a fused backend receive beside tensors: one record, passed as one string.

An operator's schema knows no structures, and each of its arguments costs microseconds a call (torch walks the
schema once an argument in each direction), so a dozen settings travel as one text, which both sides cache.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..options import OUTSIDE_KERNELS
from ..spec import ARGUMENTS, LossSpec


@dataclass(unsafe_hash=True, kw_only=True)
class FusedConfig(LossSpec):
    """A loss on a proxy that the fused kernels take.

    Attributes:
        channels: C, K_1, ..., K_L.
        sizes: kernel size of each layer, odd.
        check_labels: raise ValueError for a label that is neither a class nor ignore_index.
        upsample: where given, the kernels scale up logits that are smaller than the target; else they have its size.
        tolerance: how far a soft target's sums may lie from 1 (distributions.py); 0: it is not looked at.

    The others are those of LossSpec.
    """

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    check_labels: bool = False
    tolerance: float = 0.0

    @property
    def parameters(self) -> int:
        """Weights and biases of the proxy in all."""
        pairs = zip(self.channels, self.channels[1:], self.sizes, strict=False)
        return sum(out * (before * size * size + 1) for before, out, size in pairs)


def config_text(weights: Sequence[Tensor], spec: LossSpec, check_labels: bool, tolerance: float = 0.0) -> str:
    """The text of a FusedConfig; weights are [K_l, K_{l-1}, k, k]."""
    channels = (int(weights[0].shape[1]), *(int(weight.shape[0]) for weight in weights))
    return _text(channels, tuple(int(weight.shape[2]) for weight in weights), spec, check_labels, tolerance)


@functools.lru_cache(maxsize=256)
def _text(
    channels: tuple[int, ...], sizes: tuple[int, ...], spec: LossSpec, check_labels: bool, tolerance: float
) -> str:
    # One text for all losses that have the same kernels: each is tried on its own, and becomes a graph of its own.
    same = {**OUTSIDE_KERNELS, "reduction": "none" if spec.per_pixel else "mean"}
    values = {**dict(zip(ARGUMENTS, spec.arguments(), strict=True)), **same}
    return json.dumps(
        {**values, "channels": channels, "sizes": sizes, "check_labels": check_labels, "tolerance": tolerance}
    )


@functools.lru_cache(maxsize=256)
def parse_config(text: str) -> FusedConfig:
    """The FusedConfig that `config_text` wrote; floats come back bit for bit.

    Raises:
        ValueError: a newer version of this package wrote it.
    """
    values: dict[str, Any] = {key: _frozen(value) for key, value in json.loads(text).items()}
    if unknown := values.keys() - {field.name for field in fields(FusedConfig)}:
        raise ValueError(
            f"this graph was captured by another version of semeda_fast, which knows {', '.join(sorted(unknown))}; "
            "capture it again with this one, or install the other"
        )
    return FusedConfig(**values)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
