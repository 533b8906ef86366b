"""`pytest benchmarks/`: interleaved measurements, handed to pytest-benchmark sample by sample.

pytest-benchmark runs one test after the other, so a drift of the machine falls on some contenders only. Here the
first test of a group measures all its selected contenders interleaved, in a process of its own with the
group's allocator; then each test replays its own samples through a timer, and pytest-benchmark's tables,
files and comparisons hold those. With --benchmark-disable each contender is checked on a miniature instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from . import machine, oracle
from .contenders import NOT_INDUCTOR, Contender, contenders, upsampling, why_no_subject
from .networks import NETWORKS
from .report import tables
from .report.report import labels_text
from .suite import limits, runner
from .suite.groups import Group
from .suite.plans import WARMUP, Case, Plan, step_case
from .suite.steps import Training
from .workloads import Inputs, make_inputs

_FINAL = ("ok", "wrong", "failed")  # of a contender in a run that did not come to its end


class ReplayTimer:
    """A timer for pytest-benchmark that gives recorded durations: 0 at the start of a round, the sample at its end."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._running = False

    def load(self, samples: list[float]) -> None:
        """The samples of the next rounds."""
        self._samples, self._running = list(reversed(samples)), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else self._samples.pop()


def pytest_configure(config: pytest.Config) -> None:
    """End at once where nothing could be measured but the baselines."""
    if reason := why_no_subject():
        raise pytest.UsageError(f"pytest benchmarks/: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the time of a measurement to the limits of its steps: a test's would be that of its whole group."""
    if not config.getoption("benchmark_disable", False):
        for item in items:
            if isinstance(item, pytest.Function) and "replay" in item.fixturenames:
                item.add_marker(pytest.mark.timeout(0))


class Measurements:
    """The groups measured so far in this session; a group is measured when its first test asks for it."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.groups: dict[str, dict[str, tables.Record]] = {}
        self.problems: dict[str, dict[str, str]] = {}  # group -> contender -> why there is no result
        self._inputs: dict[str, tuple[Inputs, oracle.Oracle]] = {}
        self._training: dict[str, tuple[Training, oracle.Oracle]] = {}

    def record(self, group: Group, contender: str) -> tables.Record:
        """The result of one contender, with the samples of the run that all of the group took part in."""
        if group.name not in self.groups:
            self._measure(group)
        if problem := self.problems[group.name].get(contender):
            pytest.fail(f"{group.name}: {problem}", pytrace=False)
        return self.groups[group.name][contender]

    def _measure(self, group: Group) -> None:
        """Measure a group; a contender that takes more than its time is left out, and the others begin anew."""
        names = [name for name in group.contenders if name in self._selected(group)]
        problems = self.problems.setdefault(group.name, {})
        records: list[tables.Record] = []
        while names:
            records, problem, overrun = runner.run_worker(self._plan(group, names), say=self._say)
            if overrun is None or overrun.contender not in names:
                done = {record["contender"] for record in records if not problem or record["status"] in _FINAL}
                problems |= {name: problem for name in names if name not in done}
                break
            problems[overrun.contender] = problem
            names.remove(overrun.contender)
        self.groups[group.name] = {record["contender"]: record for record in records if record["contender"] in names}

    def _plan(self, group: Group, names: Sequence[str]) -> Plan:
        threads, warmup = machine.available_cores(), WARMUP[group.allocator]
        if group.network:
            case = replace(step_case(group.network, group.workload, threads, group.budget), contenders=tuple(names))
        else:
            case = Case("time", group.name, threads, group.workload, tuple(names), group.mode, group.budget, warmup)
        return Plan(group.name, (case,), group.allocator)

    def _say(self, step: limits.Step) -> None:
        """Show a step at once: what a test prints is kept back until it has failed."""
        plugins = self.session.config.pluginmanager
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            plugins.getplugin("terminalreporter").ensure_newline()
            plugins.getplugin("terminalreporter").write_line(f"  {step}")

    def _selected(self, group: Group) -> set[str]:
        """What -k and the like left of a group, so that nothing else is compiled and run."""
        items = [item for item in self.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
        params = [item.callspec.params for item in items]
        return {str(p["contender"]) for p in params if p.get("group") == group}

    def check_miniature(self, group: Group, contender: str) -> oracle.Check:
        """One call of a contender on a small form of the workload, compared with the reference.

        Of a training step: on the logits of a tiny network, and one step of it.
        """
        if group.network:
            return self._check_tiny_step(group, {**contenders(), **upsampling()}[contender])
        small = group.workload.replace(batch=1, height=40, width=40)
        if small.name not in self._inputs:
            inputs = make_inputs(small)
            self._inputs[small.name] = inputs, oracle.compute_oracle(inputs)
        inputs, truth = self._inputs[small.name]
        chosen = contenders()[contender]
        function = chosen.make(inputs, NOT_INDUCTOR)
        return oracle.check(function, inputs.leaf(chosen.layout), inputs, truth, chosen.checked_as)

    def _check_tiny_step(self, group: Group, contender: Contender) -> oracle.Check:
        reason = NETWORKS[group.network].why_not()
        if reason:
            pytest.skip(reason)
        if group.name not in self._training:
            small = group.workload.replace(batch=2, height=64, width=64)
            training = Training.of(group.network, small, "cpu", tiny=True)
            self._training[group.name] = training, oracle.compute_oracle(training.inputs)
        training, truth = self._training[group.name]
        function = contender.make(training.inputs, NOT_INDUCTOR)
        training.step_of(function, contender.upsamples)()
        if contender.upsamples:
            truth = oracle.of_small_logits(truth, (training.small.shape[2], training.small.shape[3]))
        leaf = training.leaf(contender.upsamples)
        return oracle.check(function, leaf, training.inputs, truth, contender.checked_as)


REPLAY = ReplayTimer()
_MEASUREMENTS = pytest.StashKey[Measurements]()


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    """What has been measured in this session."""
    found = Measurements(request.session)
    request.config.stash[_MEASUREMENTS] = found
    return found


@pytest.fixture
def replay(measurements: Measurements, benchmark: Any) -> Callable[[Group, str], None]:
    """Hand one contender's samples to pytest-benchmark; fails where its values are wrong."""

    def run(group: Group, contender: str) -> None:
        benchmark.group = group.name
        if not benchmark.enabled:
            result = benchmark.pedantic(measurements.check_miniature, args=(group, contender))
            assert result.ok, f"WRONG: {result.describe()}"
            return
        record = measurements.record(group, contender)
        if record["status"] == "skipped":
            pytest.skip(record["reason"])
        assert record["status"] == "ok", tables.verdict(record)
        benchmark.extra_info.update(extra_info(record, list(measurements.groups[group.name].values())))
        REPLAY.load(record["seconds"])
        benchmark.pedantic(lambda: None, rounds=len(record["seconds"]))

    return run


def extra_info(record: tables.Record, group: list[tables.Record]) -> dict[str, Any]:
    """What a stored result says beside its times; ratios as [value, low, high] of a 95 % interval."""
    over = tables.overhead(record, group)
    ratios: dict[str, Any] = {"overhead over cross-entropy alone": [over.value, over.low, over.high]} if over else {}
    ratios |= {
        f"{tables.BASELINE_FAMILIES[family]} / this": [ratio.value, ratio.low, ratio.high]
        for family, ratio in tables.ratios_of(record, group).items()
    }
    return {
        "workload": record["workload_name"],
        "mode": record["mode"],
        "allocator": record["allocator"],
        "threads": record["threads"],
        "labels": record["labels"]["source"],
        "edge_share": record["labels"]["edge_share"],
        "mixed_share": record["labels"]["mixed_share"],
        "saved_bytes_per_pixel": record.get("saved_bytes_per_pixel"),
        "check": record["check"],
        "interleaved": True,
        **ratios,
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The ratios of each group, which need the pairs of samples that pytest-benchmark does not know of."""
    found = config.stash.get(_MEASUREMENTS, None)
    if found is None or not found.groups:
        return
    load = machine.load_average()
    terminalreporter.section("interleaved medians and ratios")
    terminalreporter.write_line(
        f"{machine.processor_name()}, {machine.available_cores()} cores, load average now {load}; "
        "all contenders of a group ran round-robin in one process; ratios with 95 % bootstrap intervals over rounds"
    )
    for name, records in found.groups.items():
        listed = list(records.values())
        if not listed:
            continue
        terminalreporter.write_line("")
        labels = labels_text(listed[0]["labels"]) if "labels" in listed[0] else ""
        terminalreporter.write_line(f"{name}: {listed[0]['workload_name']}. {labels}")
        by_allocator = {listed[0]["allocator"]: listed}
        shown = [tables.time_table(by_allocator), tables.ratio_table(by_allocator)]
        for header, rows in [tables.step_table(listed)] if listed[0]["kind"] == "step" else shown:
            if rows:
                terminalreporter.write_line(tables.plain(header, rows))
