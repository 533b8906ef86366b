"""The errors that semeda_fast raises beside ValueError and TypeError, and its warnings.

Each derives from a built-in class, so code that catches the built-in keeps working.
"""

from __future__ import annotations

__all__ = ["BackendUnavailableError", "MaskFileError", "MissingExtraError", "ProxyFileError", "ProxyWarning"]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the text says why and what to do."""


class ProxyFileError(ValueError):
    """A file is not a readable edge proxy; the text names the file and what was found in it."""


class MaskFileError(ValueError):
    """A mask file is unreadable or holds a value that is no label; the text names the file."""


class MissingExtraError(ImportError):
    """An optional dependency is missing; the text gives the pip command that installs it."""


class ProxyWarning(UserWarning):
    """A proxy was trained, or is about to be, that will be of little use; the text says what to do."""


def missing_extra(feature: str, package: str, extra: str) -> MissingExtraError:
    """The error for `feature` needing `package`, which `pip install semeda-fast[extra]` brings."""
    return MissingExtraError(
        f"{feature} needs the package {package!r}, which is not installed; "
        f"install it with: pip install 'semeda-fast[{extra}]'",
        name=package,
    )
