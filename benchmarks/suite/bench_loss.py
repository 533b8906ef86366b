"""The loss against its baselines: `pytest benchmarks/ --benchmark-only`; what is measured is in groups.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..conftest import REPLAY
from .groups import Group, groups

_CASES = [(group, contender) for group in groups() for contender in group.contenders]


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("group", "contender"), _CASES, ids=[f"{g.name}-{c}".replace(", ", "-") for g, c in _CASES])
def test_loss(group: Group, contender: str, replay: Callable[[Group, str], None]) -> None:
    """Time of one contender in an interleaved run; fails where loss or gradient are wrong on this workload."""
    replay(group, contender)
