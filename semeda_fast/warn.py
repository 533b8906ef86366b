"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Whose frames are passed over: the library's, torch's (module calls, its compiler and dispatcher), and the decorators
# between them. A frame without a module's name is code that torch generated.
_BETWEEN = ("semeda_fast", "torch", "contextlib", "functools")


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn` at the innermost line outside this library and torch, however deep the call is."""
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__") or "<unknown>"
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _is_between(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return name is None or name.partition(".")[0] in _BETWEEN
