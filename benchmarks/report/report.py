"""The report of a run: Markdown with tables, and the plots it shows, beside its results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from semeda_fast.files import atomic_path

from .. import oracle
from ..suite.runner import Run
from ..workloads import LAMBDA_CE, LAMBDA_SEMEDA
from . import plots, tables
from .tables import Record, markdown

REPORT = "report.md"
MODE_TITLES = {
    "nograd": "forward under no_grad",
    "forward": "forward with the graph",
    "fwdbwd": "forward + backward",
    "step": "whole training step",
}
SUMMARIES = {"workloads": "Workloads", "labels": "Kinds of labels"}
SCALING_AXES = ("pixels", "classes", "batch", "threads")


def write_report(run: Run, folder: Path) -> Path:
    """Write report.md and its PNG files into `folder`, in the place of earlier ones; returns report.md.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    parts = [_title(run), _warnings(run), _setting(run), _machine(run)]
    parts += _headline(run, folder)
    for suite, title in SUMMARIES.items():
        parts += _summary(run, suite, title)
    parts += [_work(run), _memory(run, folder)]
    for axis in SCALING_AXES:
        parts += _scaling(run, axis, folder)
    parts += step_parts(run, folder)
    parts += [_plans(run), _caveats(run)]
    path = folder / REPORT
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def problems(run: Run) -> list[str]:
    """One line for each contender that was wrong or failed."""
    lines = []
    for record in run.records:
        if record["status"] in ("wrong", "failed"):
            where = f"{record['workload_name']}, {record['allocator']} malloc" if "workload_name" in record else ""
            where = f"{record['title_network']}, {where}" if "network" in record else where
            lines.append(f"`{record['contender']}` on {where}: {tables.verdict(record)}")
    return list(dict.fromkeys(lines))


def _title(run: Run) -> str:
    compilers = {record.get("compiler") for record in run.records}
    text = f"# semeda_fast benchmarks: {run.set_name} set\n\n{run.created}, `python -m benchmarks {run.command}`\n"
    if compilers - {"inductor", None}:
        text += "\n**A trial of the suite: tiny sizes, and torch.compile wrote no code. Its times mean nothing.**\n"
    return text


def _warnings(run: Run) -> str:
    lines = problems(run)
    text = ""
    if lines:
        text = "## Wrong or failed\n\nNo time is shown for these.\n\n" + "".join(f"* {line}\n" for line in lines)
    if not run.complete:
        text += "\n**This run is not complete: see Plans.**\n"
    return text


def _setting(run: Run) -> str:
    tuned = ", ".join(f"{name}" for name in ("MALLOC_ARENA_MAX=1", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"))
    reason = run.machine.get("tuned_reason")
    limits = ", ".join(f"{d} {oracle.LOSS[d]:g} and {oracle.GRADIENT[d]:g}" for d in oracle.LOSS)
    tf32 = "; the same for the reference in half precision on CUDA, whose convolutions run in TF32"
    tf32 = tf32 if run.machine.get("device") == "cuda" else ""
    return f"""## What was measured

The loss {LAMBDA_CE:g} * cross-entropy + {LAMBDA_SEMEDA:g} * SEMEDA, from logits [N,C,H,W] and labels [N,H,W] (int64)
to a number, and back to the gradient of the logits. A workload is named data-proxy-dtype-NxHxW-labels. Proxies: default
C->16->32->2, wide C->32->64->64, deep C->16->32x5->16, all 3x3.

* Contenders of one table and allocator ran in one process, round-robin, in a new random order each round. ms are
  medians with quartiles. A ratio is a ratio of medians with a 95 % bootstrap interval over rounds; it takes the faster
  layout (and compiler mode) of each side.
* Forward + backward releases the gradient inside the timed part, as a training step does.
* default malloc: glibc as it comes. tuned malloc: {tuned} (both huge), so that
  freed memory stays with the process. Each in processes of its own.{" Not here: " + reason + "." if reason else ""}
  Page faults are minor faults per call (median).
* The reference runs without the check of label values that the library makes by default; the other backends make it.
  "plain PyTorch" is a usual implementation in `benchmarks/plain.py`, whose convolutions run in bf16 under autocast;
  the library's own loss switches autocast off. Cross-entropy alone takes half-precision logits as fp32, as under
  autocast.
* fp16: the backward pass starts from 65536, as under a GradScaler.
* Before it is timed, each contender is compared with the reference in float64 on the whole workload. Allowed in the
  loss (relative) and the gradient (relative L2): {limits};
  under bf16 autocast {oracle.AUTOCAST_LOSS:g} and {oracle.AUTOCAST_GRADIENT:g}{tf32}. In float32 the gradient is
  compared away from features whose sign is decided by rounding (an L1 distance or a ReLU within {oracle.KINK:g} of
  its scale around 0), and over all pixels to {oracle.OVERALL:g}.
"""


def _machine(run: Run) -> str:
    facts = run.machine
    peaks = _peaks(run)
    native = facts["native"]
    memory = "unknown" if facts["memory_bytes"] is None else f"{facts['memory_bytes'] / 2**30:.1f} GiB"
    built = f"{native['compiler']}, C++ {native['cxx_standard']}" if native.get("available") else "not available"
    rows = [
        ["processor", facts["processor"]],
        ["vector extensions", ", ".join(facts["cpu_features"]) or "unknown"],
        ["cores, threads used", f"{facts['cores']}, {facts['threads']}"],
        ["memory", memory],
        ["device", facts.get("gpu", facts["device"])],
        ["load average before the run (1, 5, 15 min)", ", ".join(map(str, facts["load_average"] or ["unknown"]))],
        ["system", f"{facts['system']}, {facts['libc']}"],
        ["Python, torch", f"{facts['python']}, {facts['torch']}"],
        ["semeda_fast", f"{facts['semeda_fast']}, commit {facts['commit'] or 'unknown'}"],
        ["native module", built],
        ["backends that can run here", ", ".join(facts["backends"])],
    ]
    if peaks:
        rows.append(["FMA peak, fp32", f"{peaks['fma_flops'] / 1e9:.0f} GFLOP/s: {peaks['fma_how']}"])
        rows.append(["copy bandwidth, read + write", f"{peaks['copy_bytes'] / 1e9:.1f} GB/s: {peaks['copy_how']}"])
    return "## Machine\n\n" + markdown(["", "value"], rows)


def _peaks(run: Run) -> Record | None:
    return next((record for record in run.records if record["kind"] == "peaks" and record["status"] == "ok"), None)


def _headline(run: Run, folder: Path) -> list[str]:
    parts: list[str] = []
    for (name, mode, threads), by_allocator in _by_workload(run.records, "headline").items():
        some = next(iter(by_allocator.values()))[0]
        title = f"{name}, {MODE_TITLES[mode]}, {threads} thread{'s' if threads > 1 else ''}"
        rounds = {a: len(next((r["seconds"] for r in rs if r["status"] == "ok"), ())) for a, rs in by_allocator.items()}
        counts = ", ".join(f"{count} rounds with {a} malloc" for a, count in rounds.items())
        picture = f"times-{name}-{mode}.png"
        plots.draw_times(by_allocator, title, folder / picture)
        parts.append(f"### {title}\n\n{labels_text(some['labels'])} {counts}.\n")
        parts.append(markdown(*tables.time_table(by_allocator)))
        parts.append("Ratios of medians, with 95 % intervals:\n")
        parts.append(markdown(*tables.ratio_table(by_allocator)))
        parts.append(f"![times of {title}]({picture})\n")
    return ["## Headline workload\n", *parts] if parts else []


def _summary(run: Run, suite: str, title: str) -> list[str]:
    """One table for each mode and allocator, one row a workload; results.json holds every contender."""
    found: dict[tuple[str, str, int], list[list[Record]]] = {}
    for group in tables.groups(run.records, suite).values():
        found.setdefault((group[0]["mode"], group[0]["allocator"], group[0]["threads"]), []).append(group)
    parts = []
    for (mode, allocator, threads), grouped in found.items():
        kinds = ", ".join(dict.fromkeys(group[0]["labels"]["source"] for group in grouped))
        parts.append(
            f"### {MODE_TITLES[mode]}, {allocator} malloc, {threads} thread{'s' if threads > 1 else ''}\n\n"
            f"Labels: {kinds}. The fastest layout (and compiler mode) of each; results.json holds the others.\n"
        )
        parts.append(markdown(*tables.summary_table(grouped)))
    return [f"## {title}\n", *parts] if parts else []


def _by_workload(records: list[Record], suite: str) -> dict[tuple[str, str, int], dict[str, list[Record]]]:
    """Groups of one workload, mode and number of threads, by allocator."""
    found: dict[tuple[str, str, int], dict[str, list[Record]]] = {}
    for group in tables.groups(records, suite).values():
        some = group[0]
        key = (some["workload_name"], some["mode"], some["threads"])
        found.setdefault(key, {})[some["allocator"]] = group
    return found


def labels_text(labels: dict[str, Any]) -> str:
    """One sentence on the labels of a result."""
    names = {"camvid": "CamVid masks", "scenes": "synthetic scenes", "random": "random labels"}
    text = (
        f"Labels: {names[labels['source']]}; {100 * labels['edge_share']:.1f} % of the pixels have more than one label "
        f"in their 3x3 neighbourhood, {100 * labels['mixed_share']:.1f} % in the proxy's receptive field; "
        f"{100 * labels['void_share']:.1f} % are void."
    )
    return text + (f" {labels['note']}." if labels["note"] else "")


def _work(run: Run) -> str:
    records = [r for r in run.records if r["kind"] == "time" and r["suite"] == "headline" and r["mode"] == "fwdbwd"]
    able = [r for r in records if r["status"] == "ok"]
    if not able:
        return ""
    text = (
        "## Work\n\nFLOP of three dense passes through the proxy (prediction, target, gradient; a fused multiply-add "
        "is 2), bytes of logits and labels read once and the gradient written once. A backend that skips work does "
        "less than this, so its share can pass 100 %. Shares are of the fp32 FMA peak and the copy bandwidth under "
        "Machine.\n"
    )
    for name in dict.fromkeys(r["workload_name"] for r in able):
        chosen = [r for r in able if r["workload_name"] == name]
        work = chosen[0]["work"]
        text += f"\n{name}: {work['flops'] / 1000:.1f} kFLOP and {work['bytes']} bytes per pixel.\n\n"
        text += markdown(*tables.work_table(chosen, _peaks(run)))
    return text


def _memory(run: Run, folder: Path) -> str:
    records = [record for record in run.records if record["kind"] == "memory"]
    if not records:
        return ""
    name, picture = records[0]["workload_name"], "memory.png"
    plots.draw_memory(records, f"{name}, forward + backward", folder / picture)
    return (
        f"## Memory\n\n{name}, one forward + backward, each contender in a process of its own, default malloc. Peak: "
        "the largest resident set (VmHWM, reset before the call) less the resident set with inputs before it, exact to "
        "about 1 MiB; on CUDA, what torch allocated. Held between: after the forward pass, before the backward. "
        "Saved: what autograd keeps, each storage once, without logits, labels and the proxy's weights.\n\n"
        + markdown(*tables.memory_table(records))
        + f"\n![peak memory]({picture})\n"
    )


def _scaling(run: Run, axis: str, folder: Path) -> list[str]:
    records = [r for r in run.records if r["kind"] == "time" and r["suite"] == f"scaling-{axis}"]
    if not records:
        return []
    title = f"time against {plots.AXES[axis]}"
    picture = f"scaling-{axis}.png"
    plots.draw_scaling(records, axis, f"{MODE_TITLES['fwdbwd']}: {title}", folder / picture)
    parts = [f"## Scaling: {title}\n"]
    for allocator in dict.fromkeys(record["allocator"] for record in records):
        chosen = [record for record in records if record["allocator"] == allocator]
        shares = [100 * record["labels"]["edge_share"] for record in chosen]
        kinds = ", ".join(dict.fromkeys(record["labels"]["source"] for record in chosen))
        names = dict.fromkeys(record["workload_name"] for record in chosen)
        parts.append(
            f"{allocator} malloc; workloads {', '.join(names)}; labels {kinds}, "
            f"edge pixels {min(shares):.1f} to {max(shares):.1f} %.\n"
        )
        parts.append(markdown(*tables.scaling_table(chosen, axis)))
    return [*parts, f"![{title}]({picture})\n"]


def step_parts(run: Run, folder: Path) -> list[str]:
    """What the loss costs in whole training steps: a plot, and one table a network, workload and allocator."""
    found = tables.groups(run.records, "steps")
    if not found:
        return []
    peaks = [record for record in run.records if record["kind"] == "step-memory"]
    parts = [
        "## Training steps\n\nForward, loss, backward and AdamW of networks with random weights, in training mode, on "
        "one batch of noise with the workload's labels. Logits are scaled up to the image's size before the loss. "
        "Overhead: the step's median above that with cross-entropy alone, with a 95 % interval over rounds. By the "
        "loss's own time: the same difference taken between the logits and their gradient only. Peak memory: that of "
        "one step above weights, optimizer state and batch, in a process of its own, default malloc.\n"
    ]
    for (name, allocator), chosen in tables.conditions(found.values()).items():
        if not any(record["status"] == "ok" for group in chosen for record in group):
            continue
        title = f"{name}, {allocator} malloc, {chosen[0][0]['threads']} threads"
        picture = f"overhead-{name}-{allocator}.png"
        plots.draw_overhead(chosen, f"overhead of SEMEDA in a training step: {title}", folder / picture)
        parts.append(f"### {title}\n\n![{title}]({picture})\n")
        for group in chosen:
            record = group[0]
            labels = labels_text(record["labels"]) if "labels" in record else ""
            size = f"{record['parameters'] / 1e6:.1f} M weights, " if "parameters" in record else ""
            parts.append(f"**{record['title_network']}**, {size}{record['workload_name']}. {labels}\n")
            parts.append(markdown(*tables.step_table(group, peaks)))
    return parts


def _plans(run: Run) -> str:
    rows = [[p["name"], p["state"], f"{p['seconds']:.0f}", p.get("problem", "")] for p in run.plans]
    return "## Plans\n\n" + markdown(["plan", "state", "s", "why"], rows)


def _caveats(run: Run) -> str:
    threads, cores = run.machine["threads"], run.machine["cores"]
    return (
        f"## Caveats\n\n* {threads} of {cores} cores: other machines and other numbers of threads give other ratios.\n"
        "* Intervals cover the noise between rounds of this run, not the difference between two runs or two machines.\n"
        "* Other load on the machine shows in the quartiles; the load average before the run is under Machine.\n"
        "* The CUDA path of the suite has not been run yet.\n"
        "* Shares of the peak for bf16 and fp16 logits are shares of the fp32 peak.\n"
    )
