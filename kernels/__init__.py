"""Triton kernels of semeda_fast, imported as `semeda_fast.kernels`; none exist in this version.

The folder README derives the forward and backward formulas that they will implement. Importing this
package needs neither Triton nor a GPU.
"""

from __future__ import annotations

# Imported under another name there would be two copies of every kernel, each with its own compile cache.
if __name__ != "semeda_fast.kernels":
    raise ImportError(
        f"this package is semeda_fast.kernels, not {__name__!r}; install semeda_fast "
        "(pip install -e .) and import semeda_fast.kernels"
    )

__all__: list[str] = []
