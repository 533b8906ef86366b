"""Every guarantee runs on every registered backend that can run here, on every device it has."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from semeda_fast import backends


class Case(NamedTuple):
    """One backend on one device."""

    backend: str
    device: str


def registered_cases() -> list[Case]:
    """All pairs of backend and device that this machine has; a new backend joins by registering its name."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [Case(name, device) for device in devices for name in backends.available_names(device)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = registered_cases()
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Compiled code of one test must not serve, or exhaust the recompile limit of, the next."""
    torch.compiler.reset()
