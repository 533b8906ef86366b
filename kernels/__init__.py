"""Triton kernels of semeda_fast, imported as `semeda_fast.kernels`.

Importing this package, and `plan`, needs neither Triton nor a GPU. README.md derives the formulas that the kernels
cite; `launch` is what the backend runs.
"""

from __future__ import annotations

if __name__ != "semeda_fast.kernels":
    # With this repository's root on sys.path it is also found as `kernels`, a name that transformers probes for. That
    # must not fail, but no kernel may exist twice, each with its own compile cache: nothing below is found then.
    __path__ = []

__all__: list[str] = []
