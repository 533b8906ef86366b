"""`python -m benchmarks`: run, report, page, compare."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from pathlib import Path

from . import machine
from .contenders import contenders, why_no_subject
from .report import compare, page, report
from .suite import plans, runner

DEFAULT_OUTPUT = Path("build") / "bench"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of semeda_fast.")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure, and write results.json and report.md with plots")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--quick", dest="set", action="store_const", const="quick", help="under 5 minutes (default)")
    which.add_argument("--steps", dest="set", action="store_const", const="steps", help="whole training steps")
    which.add_argument("--full", dest="set", action="store_const", const="full", help="everything; hours")
    which.add_argument("--smoke", dest="set", action="store_const", const="smoke", help="miniature, to try it out")
    run.set_defaults(set="quick")
    run.add_argument("--only", metavar="PATTERN", help="only plans whose name this regular expression matches")
    run.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"default {DEFAULT_OUTPUT}/SET; replaces results in it",
    )
    run.add_argument("--threads", type=int, default=None, help="default: all cores that this process may use")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="import this module in every worker, for instance to register a backend",
    )  # fmt: skip
    run.add_argument("--limit", type=float, default=None, metavar="SECONDS", help="begin no plan after this time")
    run.add_argument("--list", action="store_true", help="list plans and contenders, measure nothing")

    again = commands.add_parser("report", help="write report.md and plots anew from a results.json")
    again.add_argument("results", type=Path, help="results.json or its folder")
    again.add_argument("--output", type=Path, default=None, metavar="DIR", help="default: the results' folder")

    commands.add_parser("page", help="tables and plots of docs/evidence.md anew, from benchmarks/results")

    both = commands.add_parser("compare", help="what got faster or slower between two runs, beyond the noise")
    both.add_argument("old", type=Path)
    both.add_argument("new", type=Path)
    both.add_argument("--threshold", type=float, default=0.03, help="smallest relative change shown (default 0.03)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1: a contender was wrong or failed, or something got slower; 2: a bad call; 130: interrupted."""
    options = parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if options.command == "run":
            return _run(options, shlex.join(given))
        if options.command == "page":
            print("\n".join(map(str, page.write_page())))
            return 0
        if options.command == "report":
            results = options.results
            folder = options.output or (results if results.is_dir() else results.parent)
            folder.mkdir(parents=True, exist_ok=True)
            print(report.write_report(runner.load_run(results), folder))
            return 0
        text, worse = compare.describe(runner.load_run(options.old), runner.load_run(options.new), options.threshold)
        print(text)
        return int(worse)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, command: str) -> int:
    threads = options.threads or machine.available_cores()
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    for name in options.imports:
        __import__(name)
    chosen = plans.make_plans(
        options.set,
        device=options.device,
        threads=threads,
        fused=[name for name, contender in contenders(options.device).items() if contender.fused],
        tuned=not runner.tuned_reason(),
    )
    if options.only:
        chosen = [plan for plan in chosen if re.search(options.only, plan.name)]
    if not chosen:
        raise ValueError(f"no plan of the {options.set} set matches {options.only!r}; --list shows them")
    if options.list:
        _list(chosen, options.device)
        return 0
    if reason := why_no_subject(options.device):
        raise ValueError(reason)
    folder = options.output or DEFAULT_OUTPUT / options.set
    limit = options.limit or (plans.QUICK_LIMIT if options.set == "quick" else None)
    run = runner.new_run(options.set, command, options.device, threads)
    code = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the worker is ended, results are kept
    try:
        runner.run_plans(chosen, run, folder, limit=limit, imports=options.imports)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept", file=sys.stderr)
        code = 130
    if run.records:
        print(report.write_report(run, folder))
    lines = report.problems(run)
    for line in lines:
        print(f"WRONG OR FAILED: {line}", file=sys.stderr)
    broken = [plan for plan in run.plans if plan["state"] == "failed" and "time was up" not in plan["problem"]]
    for plan in broken:
        print(f"plan {plan['name']} failed: {plan['problem']}", file=sys.stderr)
    return code or int(bool(lines or broken))


def _list(chosen: list[plans.Plan], device: str) -> None:
    for plan in chosen:
        print(plan.name)
        for case in plan.cases:
            what = case.workload.name if case.workload else "FMA peak, copy bandwidth"
            print(f"    {case.kind:6} {what} {case.mode} {case.threads} threads: {' '.join(case.contenders)}")
    print("contenders here:")
    for contender in contenders(device).values():
        print(f"    {contender.name:22} {contender.title}")


if __name__ == "__main__":
    sys.exit(main())
