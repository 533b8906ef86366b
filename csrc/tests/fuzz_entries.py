"""Calls every function of a native module with memory that is right, or wrong in one place.

    python csrc/tests/fuzz_entries.py PATH_OF_MODULE [--calls 1000] [--seed 0] [--last FILE]

A right call must succeed; a wrong one must raise, and name what is wrong where that is memory. `make fuzz-native` runs
this under the address sanitizer (fuzz_native.py), where memory that is read or written all the same ends the process;
FILE then holds the call that did. Imports neither torch nor semeda_fast.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import sys
from pathlib import Path
from typing import Any

import fuzz_cpu
import fuzz_cuda
from fuzz_cases import Call
from fuzz_memory import Arena
from fuzz_problems import BACKWARD, FORWARD
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError, OverflowError)
# How an error calls what the fuzzer calls otherwise.
SPOKEN = {"loss_at": "the loss", "d_loss_at": "the gradient of the loss", "kept": "what forward keeps"}
NAMED = FORWARD | BACKWARD | SPOKEN.keys() | {"workspace", "ce", "semeda", "per_layer", "ce_weight", "valid_count"}
FILLS = (0x00, 0x01, 0x3C, 0xFF)  # each byte of the memory
CONSTANTS = {"MAX_CLASSES"}


def load(path: Path) -> Any:
    """The module of that file; its name is what stands in front of the first dot."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Judge:
    """Runs cases, counts them, and leaves word of each before it runs."""

    def __init__(self, last: Path | None) -> None:
        self._last = last.open("w") if last else None
        self.counts: collections.Counter[tuple[str, bool]] = collections.Counter()

    def run(self, entry: str, what: str, call: Call, fill: int) -> None:
        text = f"{entry}: {what or 'nothing wrong'}"
        if self._last is not None:
            self._last.seek(0)
            self._last.truncate()
            self._last.write(text + "\n")
            self._last.flush()
        self.counts[entry, bool(what)] += 1
        with Arena(fill) as arena:
            try:
                call(arena)
            except REFUSALS as error:
                if not what:
                    raise AssertionError(f"{text}: refused: {error}") from error
                if not _is_named(what, error):
                    raise AssertionError(f"{text}: the error names something else: {error}") from error
                return
        if what:
            raise AssertionError(f"{text}: taken")


def _is_named(what: str, error: Exception) -> bool:
    """Whether an error tells which memory is wrong, where it is memory."""
    name = what.partition(": ")[0]
    early = isinstance(error, TypeError) or "dtype" in what or "offset" in what  # found before it has a name
    return early or name not in NAMED or SPOKEN.get(name, name) in str(error)


def fuzz(module: Any, calls: int, number: int, last: Path | None) -> Judge:
    """That many calls, most of them of the entries that take the most memory."""
    known = fuzz_cuda if hasattr(module, "cuda_forward") else fuzz_cpu
    public = {name for name in dir(module) if not name.startswith("_")} - CONSTANTS
    if public != set(known.ENTRIES):
        raise AssertionError(f"entries that not both the module and the fuzzer have: {public ^ set(known.ENTRIES)}")
    names = [name for name in known.ENTRIES for _ in range(known.WEIGHTS.get(name, 1))]
    judge = Judge(last)

    @seed(number)
    @settings(
        max_examples=calls,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        cases = list(known.ENTRIES[name](module, data.draw))
        right = [case for case in cases if not case[0]]
        wrong = [case for case in cases if case[0]]
        chosen = right if right and (not wrong or data.draw(st.integers(0, 2)) == 0) else wrong
        judge.run(name, *data.draw(st.sampled_from(chosen)), data.draw(st.sampled_from(FILLS)))

    one()
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, help="where each call is noted before it runs")
    options = parser.parse_args()
    module = load(options.module)
    if hasattr(module, "force_tile"):
        module.force_tile(*fuzz_cuda.TILE)
    try:
        judge = fuzz(module, options.calls, options.seed, options.last)
    except AssertionError as error:
        sys.exit(f"{options.module.name}: {error}")
    for name in sorted({entry for entry, _ in judge.counts}):
        print(f"{name:20} {judge.counts[name, False]:6} right {judge.counts[name, True]:6} wrong")
    total = sum(judge.counts.values())
    print(f"{total} calls of {options.module.name}: those that were right succeeded, all others raised")
    sys.exit(total < options.calls)


if __name__ == "__main__":
    main()
