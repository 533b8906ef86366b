"""The frozen network that measures structure, and everything that makes one: masks, edge labels, training."""

from .edges import edge_labels
from .masks import MaskFolder, pair_files, read_mask, read_pair
from .network import EdgeProxy
from .record import ProxyLayer
from .synthetic import SyntheticMasks, synthetic_mask
from .training import train_proxy

__all__ = [
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
]
