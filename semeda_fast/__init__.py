"""The SEMEDA segmentation loss: cross-entropy plus feature matching in a frozen edge-detection network.

from semeda_fast import SemedaLoss

criterion = SemedaLoss(num_classes=21, ignore_index=255)
loss = criterion(logits, target)
"""

import sys
from typing import TYPE_CHECKING

# The command prints its help without torch. Everybody else gets names and operators with the import.
if TYPE_CHECKING or not getattr(sys.modules.get("semeda_fast_command"), "running", False):
    from .backends import backend_info
    from .counts import LossCounts
    from .functional import semeda_loss
    from .loss import SemedaLoss
    from .outputs import MultiScaleLoss
    from .pickles import safe_globals
    from .proxy.network import EdgeProxy
    from .proxy.training import train_proxy

__version__ = "0.1.0"

__all__ = [
    "EdgeProxy",
    "LossCounts",
    "MultiScaleLoss",
    "SemedaLoss",
    "__version__",
    "backend_info",
    "safe_globals",
    "semeda_loss",
    "train_proxy",
]
