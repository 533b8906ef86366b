"""Two stored runs side by side: what got faster or slower beyond the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..suite.runner import Run
from ..timing import Ratio, unpaired_ratio
from .tables import Record, median, number, plain, ratio_text

# What has to be equal for two times to be comparable.
FACTS = ("processor", "cores", "threads", "device", "gpu", "torch", "python", "libc")
TIMED = ("time", "step")  # kinds of records with samples
CONTROLS = ("ce", "reference")  # code that this library's kernels do not touch


@dataclass(frozen=True)
class Change:
    """One measurement that both runs have."""

    key: tuple[Any, ...]
    ratio: Ratio  # new / old
    old: float
    new: float

    def verdict(self, threshold: float) -> str:
        """ "faster", "slower" or "": the interval excludes 1, and the change is above `threshold` (relative)."""
        if self.ratio.high < 1 and self.ratio.value < 1 - threshold:
            return "faster"
        if self.ratio.low > 1 and self.ratio.value > 1 + threshold:
            return "slower"
        return ""


def key_of(record: Record) -> tuple[Any, ...]:
    """What names a measurement across runs."""
    fields = ("workload_name", "mode", "allocator", "threads", "contender")
    suite = record["suite"] if record["kind"] == "time" else f"{record['suite']}/{record['network']}"
    return (suite, *(record[name] for name in fields))


def changes(old: Run, new: Run) -> list[Change]:
    """Every timing that both runs have."""
    before = {key_of(r): r for r in old.records if r["kind"] in TIMED and r["status"] == "ok"}
    found = []
    for record in new.records:
        if record["kind"] in TIMED and record["status"] == "ok" and key_of(record) in before:
            earlier = before[key_of(record)]
            ratio = unpaired_ratio(record["seconds"], earlier["seconds"])
            found.append(Change(key_of(record), ratio, median(earlier), median(record)))
    return found


def differences(old: Run, new: Run) -> list[str]:
    """One line for each fact of machine, threads or versions in which the runs differ."""
    lines = []
    for name in FACTS:
        a, b = old.machine.get(name), new.machine.get(name)
        if a != b:
            lines.append(f"{name}: {a} in the old run, {b} in the new one")
    if old.set_name != new.set_name:
        lines.append(f"set: {old.set_name} in the old run, {new.set_name} in the new one")
    a_labels, b_labels = _label_sources(old), _label_sources(new)
    if a_labels != b_labels:
        lines.append(f"labels: {', '.join(a_labels)} in the old run, {', '.join(b_labels)} in the new one")
    return lines


def newly_wrong(old: Run, new: Run) -> list[str]:
    """Measurements that had a time in the old run and are wrong or failed in the new one."""
    before = {key_of(r) for r in old.records if r["kind"] in TIMED and r["status"] == "ok"}
    return [
        f"{' '.join(map(str, key_of(r)))}: {r['reason']}"
        for r in new.records
        if r["kind"] in TIMED and r["status"] in ("wrong", "failed") and key_of(r) in before
    ]


def describe(old: Run, new: Run, threshold: float) -> tuple[str, bool]:
    """The comparison as text, and whether anything got slower or wrong."""
    parts = [f"WARNING: {line}" for line in differences(old, new)]
    found = changes(old, new)
    if not found:
        return "\n".join([*parts, "the runs have no measurement in common"]), False
    parts.append(_controls(found))
    rows = []
    slower = False
    for change in sorted(found, key=lambda change: change.ratio.value):
        verdict = change.verdict(threshold)
        slower = slower or (verdict == "slower" and change.key[-1] not in CONTROLS)
        if verdict:
            suite, workload, mode, allocator, threads, contender = change.key
            times = [number(1000 * change.old), number(1000 * change.new), ratio_text(change.ratio)]
            rows.append([contender, f"{suite} {workload} {mode} {allocator} {threads}t", *times, verdict])
    unchanged = len(found) - len(rows)
    if rows:
        header = ["contender", "measurement", "old ms", "new ms", "new/old [95 %]", ""]
        parts.append(plain(header, rows))
    parts.append(f"{len(rows)} changed by more than {100 * threshold:g} % beyond the noise, {unchanged} did not")
    wrong = newly_wrong(old, new)
    parts += [f"NOW WRONG: {line}" for line in wrong]
    return "\n".join(parts), slower or bool(wrong)


def _controls(found: list[Change]) -> str:
    """How much code moved that did not change: what the machine contributes to every ratio."""
    ratios = sorted(change.ratio.value for change in found if change.key[-1] in CONTROLS)
    if not ratios:
        return "no control (cross-entropy alone, reference) in both runs: drift of the machine is unknown"
    middle = ratios[len(ratios) // 2]
    return (
        f"controls (cross-entropy alone, reference eager): new/old between {ratios[0]:.2f} and {ratios[-1]:.2f}, "
        f"median {middle:.2f}; changes of this size are the machine's"
    )


def _label_sources(run: Run) -> list[str]:
    return sorted({record["labels"]["source"] for record in run.records if "labels" in record})
