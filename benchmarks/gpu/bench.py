"""The benchmarks of `make gpu`: the suite's contenders on workloads of a GPU's size, the most important first.

Each plan is a process of its own (`runner.py`); what has not begun when the time is up is left out and named in
results.json, and a plan that is stopped keeps its finished cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import labels, machine
from ..contenders import fused_names, why_no_subject
from ..suite import runner
from ..suite.plans import Case, Plan, gpu_steps
from ..timing import Budget
from ..workloads import Workload, named

SET_NAME = "gpu"
CUT_SHORT = 4  # exit code, as in gpu.py
# torch.compile in both layouts with and without autocast, and what eager training does.
HEADLINE = (
    "ce",
    "ce_compiled",
    "reference",
    "autocast",
    "autocast_cl",
    "compiled",
    "compiled_autocast",
    "compiled_autocast_cl",
    "fused",
)
SHORT = ("ce", "autocast", "autocast_cl", "fused")
MEMORY = ("ce", "reference", "autocast", "compiled_autocast")
VOC = {"batch": 16, "height": 513, "width": 513}


def label_kind() -> tuple[str, str]:
    """Which labels can be had here, and a note where they are not those of the workloads' names."""
    if importlib.util.find_spec("PIL") is None:
        return "random", "random labels: without Pillow neither CamVid masks nor scenes can be had"
    found = labels.camvid_folder().joinpath("val", "masks").is_dir()
    return ("camvid", "") if found else ("scenes", "CamVid masks not found: synthetic scenes instead")


def make_plans(threads: int, fused: Sequence[str], kind: str = "camvid", device: str = "cuda") -> list[Plan]:
    """All plans, the most important first.

    Args:
        fused: backends that can run here, in "nchw" alone, for the table of memory.
        kind: of labels, see `labels.KINDS`.
    """

    def time(suite: str, workload: Workload, contenders: Sequence[str], seconds: float) -> Case:
        return Case("time", suite, threads, workload, tuple(contenders), budget=Budget(seconds, 7, 60))

    voc = named("voc", dtype="bfloat16", labels=kind, **VOC)
    wide = voc.replace(proxy="wide")
    small = voc.replace(batch=2, height=256, width=256)
    cityscapes = named("cityscapes", dtype="bfloat16", labels=kind, batch=4, height=1024, width=1024)
    ade20k = named("ade20k", dtype="bfloat16", labels=kind, batch=8, height=512, width=512)
    exact = ("ce", "reference", "reference_cl", "compiled", "fused")
    paper, *others = gpu_steps(threads, fused, kind)
    plans = [
        Plan("machine", (Case("peaks", "machine", threads),)),
        Plan("voc-default", (time("headline", voc, HEADLINE, 4.0),)),
        Plan("voc-wide", (time("headline", wide, HEADLINE, 4.0),)),
        Plan("memory-default", (Case("memory", "memory", threads, voc, (*MEMORY, *fused)),)),
        Plan(
            "workloads",
            (
                time("workloads", small, (*SHORT, "compiled_autocast"), 2.0),
                time("workloads", voc.replace(labels="random"), SHORT, 2.0),
                time("workloads", cityscapes, SHORT, 2.0),
                time("workloads", ade20k, SHORT, 2.0),
            ),
        ),
        paper,
        Plan("memory-wide", (Case("memory", "memory", threads, wide, (*MEMORY, *fused)),)),
        Plan(
            "dtypes",
            (
                time("workloads", voc.replace(dtype="float16"), SHORT, 2.0),
                time("workloads", voc.replace(dtype="float32"), exact, 2.0),
                time("workloads", voc.replace(proxy="deep"), SHORT, 2.0),
            ),
        ),
        *others,
    ]
    return [Plan(plan.name, plan.cases, device=device) for plan in plans]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description="The benchmarks of make gpu.")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="results.json in it is replaced")
    made.add_argument("--limit", type=float, default=None, metavar="SECONDS", help="begin no plan after this time")
    made.add_argument("--plans", default="", metavar="REGEX", help="only plans whose name this matches")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1: a contender was wrong or failed; 2: a bad call; 4: the time was up before all was measured."""
    options = parser().parse_args(arguments)
    kind, note = label_kind()
    threads = machine.available_cores()
    fused = fused_names("cuda")
    chosen = [plan for plan in make_plans(threads, fused, kind) if re.search(options.plans, plan.name)]
    if not chosen:
        print(f"error: no plan matches {options.plans!r}", file=sys.stderr)
        return 2
    for text in (note, "" if fused else f"baselines only: {why_no_subject('cuda')}"):
        if text:
            print(f"  note: {text}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the worker is ended, results are kept
    run = runner.new_run(SET_NAME, f"gpu --plans '{options.plans}'", "cuda", threads)
    run.machine["label_note"] = note
    try:
        runner.run_plans(chosen, run, options.output, limit=options.limit)
    except KeyboardInterrupt:
        run.save(options.output)
        return 130
    bad = [record for record in run.records if record["status"] in ("wrong", "failed")]
    unfinished = [plan for plan in run.plans if plan["state"] != "done"]
    if bad or any("the time was up" not in plan["problem"] for plan in unfinished):
        return 1
    return CUT_SHORT if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
