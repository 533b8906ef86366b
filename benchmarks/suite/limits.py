"""What a worker is doing, and how long that may take: each step has a limit of its own, and no group has one for all.

A worker announces each step before it begins, as a line of JSON on its stdout; the process that started it shows the
step, and stops the worker where it overruns. The limit of preparing a contender follows from the workload's size and
from whether something is compiled; that of the timed rounds from their number and from what the contenders took in
the warm-up. All are many times what an idle machine needs: they are there for what hangs.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..contenders import Contender
from ..timing import Budget

LEAST = 120.0  # seconds of any step, for a machine that does something else meanwhile
SLACK = 10.0
COMPILATION = 480.0  # torch.compile: 20 to 60 s on an idle machine
SEARCH = 1200.0  # and with max-autotune
PER_PIXEL = 2e-5  # a few calls of the slowest contender, the eager reference, take that: 10 s for the headline
BETWEEN = 5.0  # seconds between two announcements of timed rounds, which must not disturb them
_MARK = "\x1e"  # in front of a step: anything may print to a worker's stdout


@dataclass(frozen=True)
class Step:
    """What a worker does next.

    Attributes:
        what: in words.
        seconds: that it may take.
        contender: whose step it is; "" where it is that of all.
    """

    what: str
    seconds: float
    contender: str = ""

    def __str__(self) -> str:
        return f"{self.what} (up to {self.seconds:.0f} s)"


Say = Callable[[Step], None]
START = Step("starting a worker", LEAST)


def preparing(contender: Contender, pixels: int) -> float:
    """Seconds to make a contender and check it on a workload of so many pixels, or to call it for the first time."""
    compilation = 0.0
    if contender.compiled:
        compilation = SEARCH if "max" in contender.name else COMPILATION
    return LEAST + compilation + SLACK * PER_PIXEL * pixels


def planned_rounds(budget: Budget, seconds: float) -> int:
    """How many rounds of so many seconds each a budget is good for."""
    wanted = budget.max_rounds if seconds <= 0 else -int(-budget.seconds // seconds)
    return min(budget.max_rounds, max(budget.min_rounds, wanted))


class Watch:
    """Announces warm-up and rounds of an interleaved run.

    Args:
        label: of the run.
        first: contender -> seconds that its first call may take.
    """

    def __init__(self, label: str, first: Mapping[str, float], budget: Budget, say: Say) -> None:
        self.label, self.first, self.budget, self.say = label, first, budget, say
        self._calls: dict[str, float] = {}
        self._what = ""
        self._said = 0.0

    def warming(self, name: str) -> None:
        """Before a call that is not timed; some compile something in the first one."""
        if name in self._calls:
            self._together("warm-up", "")
        else:
            self.say(Step(f"{self.label}: {name}, warm-up", self.first.get(name, LEAST), name))

    def warmed(self, name: str, seconds: float) -> None:
        """After it."""
        self._calls[name] = seconds

    def round(self, number: int) -> None:
        """Before a round of timed calls."""
        rounds = planned_rounds(self.budget, sum(self._calls.values()))
        self._together("round", f" {number} of about {rounds}")

    def _together(self, what: str, where: str) -> None:
        """Calls of all in turns: announced when they begin, and then now and again."""
        now = time.monotonic()
        if what == self._what and now - self._said < BETWEEN:
            return
        self._what, self._said = what, now
        # As many rounds as begin before the next announcement, and the last of them.
        seconds = LEAST + SLACK * (BETWEEN + sum(self._calls.values()))
        self.say(Step(f"{self.label}: {len(self._calls)} side by side, {what}{where}", seconds))


def show(step: Step) -> None:
    """Say on stderr what is being done; stdout belongs to results."""
    print(f"  {step}", file=sys.stderr, flush=True)


def send(step: Step) -> None:
    """Say it to the process that `follow`s this one."""
    print(_MARK + json.dumps(vars(step)), flush=True)


def follow(process: subprocess.Popen[str], say: Say, timeout: float | None = None) -> Step | None:
    """Show the steps of a worker (stdout is a pipe) until it ends, overruns one, or the time is up.

    Returns:
        None where it ended by itself, else the step in which it is to be stopped.

    Raises:
        TimeoutError: `timeout` seconds are over.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = None if timeout is None else time.monotonic() + timeout
    step, due = START, time.monotonic() + START.seconds
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(due, end or due, time.monotonic() + 1) - time.monotonic()))
        except queue.Empty:
            if process.poll() is not None:  # what it has started may hold its stdout open
                return None
            if end is not None and end <= time.monotonic():
                raise TimeoutError from None
            if due <= time.monotonic():
                return step
            continue
        if line is None:
            return None
        if line.startswith(_MARK):
            step = Step(**json.loads(line[1:]))
            due = time.monotonic() + step.seconds
            say(step)
        else:
            print(line, end="", file=sys.stderr, flush=True)


def first_calls(contenders: Sequence[Contender], pixels: int) -> dict[str, float]:
    """`preparing` of each, by name."""
    return {contender.name: preparing(contender, pixels) for contender in contenders}
