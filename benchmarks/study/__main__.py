"""`python -m benchmarks.study`."""

from __future__ import annotations

import sys

from .runs import main

if __name__ == "__main__":
    sys.exit(main())
