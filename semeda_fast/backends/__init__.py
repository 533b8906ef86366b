"""The engine room behind one door: which backends there are, the choice between them, and the definition.

Nothing above imports below this file.
"""

from .fused import why_not_fused
from .native import cuda_info, native_info, native_module
from .operator import installation, loss_terms
from .prepared import eager_loss
from .problem import Inputs, spec_of
from .reference import distance_maps, features, not_ignored
from .registry import (
    Backend,
    BackendInfo,
    BackendStatus,
    available_names,
    backend_info,
    check_name,
    get,
    names,
    register,
    unregister,
)
from .warmup import warmup

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendStatus",
    "Inputs",
    "available_names",
    "backend_info",
    "check_name",
    "cuda_info",
    "distance_maps",
    "eager_loss",
    "features",
    "get",
    "installation",
    "loss_terms",
    "names",
    "native_info",
    "native_module",
    "not_ignored",
    "register",
    "spec_of",
    "unregister",
    "warmup",
    "why_not_fused",
]
