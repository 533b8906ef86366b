"""What a pickle of the library's modules is made of."""

from __future__ import annotations

from .loss import SemedaLoss
from .outputs import MultiScaleLoss
from .proxy.network import EdgeProxy, ProxyLayer


def safe_globals() -> list[type]:
    """The classes that a pickled SemedaLoss or EdgeProxy names, beside those that torch knows.

    A checkpoint that holds a whole criterion, and not a state_dict, loads without running code of the file:

        >>> with torch.serialization.safe_globals(semeda_fast.safe_globals()):
        ...     checkpoint = torch.load("checkpoint.pt", weights_only=True)

    or, for the rest of the process, after `torch.serialization.add_safe_globals(semeda_fast.safe_globals())`.
    """
    return [SemedaLoss, MultiScaleLoss, EdgeProxy, ProxyLayer]
