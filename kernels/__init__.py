"""Triton kernels of semeda_fast, imported as `semeda_fast.kernels`; none exist in this version.

The folder README derives the forward and backward formulas that they will implement. Importing this
package needs neither Triton nor a GPU.
"""

from __future__ import annotations

if __name__ != "semeda_fast.kernels":
    # With this repository's root on sys.path it is also found as `kernels`, a name that transformers probes for. That
    # must not fail, but no kernel may exist twice, each with its own compile cache: nothing below is found then.
    __path__ = []

__all__: list[str] = []
