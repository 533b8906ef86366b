"""docs/evidence.md: its tables and plots, made anew from the results that are stored under benchmarks/results.

`python -m benchmarks page` replaces what stands between `<!-- made: NAME -->` and `<!-- end -->`; the text around it is
written by hand. NAME is "overhead FOLDER" (training steps of a results.json) or "accuracy FOLDER" (a study.json).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

from semeda_fast.files import atomic_path

from ..statistics import Interval, mean_interval
from ..study import runs as study
from ..study.recipes import BASES, RECIPES, RIVALS
from ..suite.runner import load_run
from . import plots, tables
from .tables import Record, Rows, markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "benchmarks" / "results"
_MADE = re.compile(r"(<!-- made: (\w+) ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
METRIC_TITLES = {"miou": "mIoU", "boundary_iou": "boundary IoU", "boundary_f": "boundary F"}


def write_page(page: Path = PAGE, results: Path = RESULTS) -> list[Path]:
    """Fill the page's marked parts, draw its pictures beside it; returns what was written.

    Raises:
        ValueError: a mark that no maker knows, or a page without marks.
        FileNotFoundError: results that a mark names are not there.
    """
    written: list[Path] = []
    makers: dict[str, Callable[[Path, Path], tuple[str, list[Path]]]] = {"overhead": _overhead, "accuracy": _accuracy}

    def fill(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        if kind not in makers:
            raise ValueError(f"{page}: '<!-- made: {kind} ... -->' is none of {', '.join(makers)}")
        text, pictures = makers[kind](results / name, page.parent / "results")
        written.extend(pictures)
        return f"{begin}\n{text.strip()}\n\n{end}"

    before = page.read_text(encoding="utf-8")
    if not _MADE.search(before):
        raise ValueError(f"{page} has no part marked '<!-- made: KIND FOLDER -->' ... '<!-- end -->'")
    (page.parent / "results").mkdir(exist_ok=True)
    text = _MADE.sub(fill, before)
    with atomic_path(page, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [page, *written]


def _overhead(folder: Path, pictures: Path) -> tuple[str, list[Path]]:
    """One table a data set and allocator, rows networks, columns implementations; a plot of each."""
    run = load_run(folder)
    grouped = tables.groups(run.records, "steps")
    peaks = [record for record in run.records if record["kind"] == "step-memory"]
    facts, parts, written = run.machine, [], []
    if not run.complete:
        undone = [plan for plan in run.plans if plan["state"] != "done"]
        missing = [f"{plan['name']} ({plan['problem'] or plan['state']})" for plan in undone]
        parts.append(f"**This run is not complete.** It lacks {', '.join(missing) or 'what its time did not reach'}.\n")
    device = facts.get("gpu") or f"{facts['processor']}, {facts['threads']} threads"
    parts.append(f"{device}; torch {facts['torch']}; {run.created[:10]}, commit {facts['commit'] or 'unknown'}.\n")
    for (name, allocator), chosen in tables.conditions(grouped.values()).items():
        some = chosen[0][0]["workload"]
        size = f"{some['batch']}x{some['height']}x{some['width']}"
        distance = {"l1": "L1", "l2": "L2", "smooth_l1": "smooth L1"}[some.get("distance", "l1")]
        title = f"{some['dataset']} ({some['num_classes']} classes), {distance}, {size}, {allocator} malloc"
        parts += [f"### {title}\n", markdown(*_overhead_table(chosen))]
        path = pictures / f"overhead-{folder.name}-{name}-{allocator}.png"
        plots.draw_overhead(chosen, f"overhead of SEMEDA in a training step: {title}", path)
        written.append(path)
        parts.append(f"![overhead, {title}](results/{path.name})\n")
    if peaks:
        parts += ["### Peak memory of a step above weights, optimizer state and batch, MiB\n"]
        parts.append(markdown(*_peak_table(peaks)))
    return "\n".join(parts), written


def _overhead_table(grouped: list[list[Record]]) -> tuple[list[str], Rows]:
    names = dict.fromkeys(r["contender"] for group in grouped for r in group if r["contender"] != "ce")
    titles = {r["contender"]: r["title"] for group in grouped for r in group}
    header = ["network", "cross-entropy: step, ms", "images/s"]
    for name in names:
        header += [f"+ {titles[name]}", "by the loss's own time"]
    rows = []
    for group in grouped:
        found = {record["contender"]: record for record in group}
        plain = found["ce"]
        if plain["status"] != "ok":
            rows.append([plain["title_network"], tables.verdict(plain), *[""] * (len(header) - 2)])
            continue
        speed = plain["workload"]["batch"] / tables.median(plain)
        row = [plain["title_network"], tables.number(1000 * tables.median(plain)), tables.number(speed)]
        for name in names:
            if name not in found:  # a network that scales its logits up itself
                row += ["", ""]
                continue
            over, own = tables.overhead(found[name], group), tables.loss_part(found[name], group)
            if over is None:
                row += [tables.verdict(found[name]), ""]
                continue
            low, high = tables.percent(over.low), tables.percent(over.high)
            row += [f"{tables.percent(over.value)} [{low}, {high}]", "" if own is None else tables.percent(own)]
        rows.append(row)
    return header, rows


def _peak_table(peaks: list[Record]) -> tuple[list[str], Rows]:
    names = dict.fromkeys(record["contender"] for record in peaks)
    titles = {record["contender"]: record["title"] for record in peaks}
    rows = []
    for network in dict.fromkeys(record["network"] for record in peaks):
        found = {record["contender"]: record for record in peaks if record["network"] == network}
        row = [next(iter(found.values()))["title_network"]]
        for name in names:
            record = found.get(name)
            known = record is not None and record["status"] == "ok" and record["above_inputs"] is not None
            row.append(f"{record['above_inputs'] / 2**20:.0f}" if known and record is not None else "")
        rows.append(row)
    return ["network", *(titles[name] for name in names)], rows


def _accuracy(folder: Path, pictures: Path) -> tuple[str, list[Path]]:
    """One table a base recipe: the base, and every recipe that is compared with it, by their common seeds."""
    found = study.load(folder / study.STUDY)
    runs = found["runs"]
    facts = found["machine"]
    parts = [
        f"{facts['processor']}, torch {facts['torch']}; {found['created'][:10]}; `{folder.name}/{study.STUDY}`. "
        f"All runs: `{' '.join(found['training'])}`.\n"
    ]
    written = []
    for base in BASES:
        rows, differences = _study_rows(runs, base)
        if not rows:
            continue
        title = next(recipe.title for recipe in RECIPES if recipe.name == base)
        header = ["recipe", "seeds", *METRIC_TITLES.values(), *(f"{t}, difference" for t in METRIC_TITLES.values())]
        parts += [f"### Against {title}\n", markdown(header, rows), *_scatter(runs, base, title)]
        if differences:
            path = pictures / f"accuracy-{folder.name}-{base}.png"
            plots.draw_differences(differences, f"differences to {title}, same seeds", path)
            written.append(path)
            parts.append(f"![differences to {title}](results/{path.name})\n")
    if rivals := _rival_rows(runs):
        header = ["recipe", "against", "seeds", *(f"{t}, difference" for t in METRIC_TITLES.values())]
        parts += ["### One recipe against another\n", markdown(header, rivals)]
    if found["gradients"]:
        parts.append("### How the SEMEDA term (lambda 1) pulls at the logits, beside cross-entropy\n")
        parts.append(markdown(*_norm_table(found["gradients"])))
        parts.append(markdown(*_pull_table(found["gradients"])))
    return "\n".join(parts), written


def _scatter(runs: list[dict[str, Any]], base: str, title: str) -> list[str]:
    """A sentence on how far apart the seeds of a base are, which the reader may hold a difference against."""
    chosen = [run for run in runs if run["recipe"] == base]
    if len(chosen) < 2:
        return []
    spread = [f"{stdev(run[metric] for run in chosen):.4f} {name}" for metric, name in METRIC_TITLES.items()]
    return [f"Standard deviation between the {len(chosen)} seeds of {title}: {', '.join(spread)}.\n"]


def _norm_table(facts: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    terms = list(facts[0]["terms"])
    header = ["network", *(f"{term}: norm, cosine" for term in terms)]
    rows = []
    for fact in facts:
        cells = [f"{fact['terms'][term]['norm_ratio']:.1f}, {fact['terms'][term]['cosine']:+.2f}" for term in terms]
        rows.append([f"{fact['recipe']}, {fact['when']}", *cells])
    return header, rows


def _pull_table(facts: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    names = study.CLASSES.split(",")
    rows = [["share of the pixels", *(f"{100 * share:.1f} %" for share in facts[0]["share"])]]
    for fact in facts:
        pulls = {"cross-entropy": fact["ce_pull"]}
        pulls |= {term: fact["terms"][term]["pull"] for term in ("all layers", "layer 3", "all layers, l2")}
        for term, values in pulls.items():
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            rows.append([f"{fact['recipe']}, {fact['when']}: {term}", *cells])
    return ["mean pull on a pixel's own class", *names], rows


Runs = dict[tuple[str, int], dict[str, Any]]  # (recipe, seed) -> run
Differences = dict[str, dict[str, Interval]]  # recipe's title -> metric's title -> interval


def _study_rows(runs: list[dict[str, Any]], base: str) -> tuple[Rows, Differences]:
    values = {(run["recipe"], run["seed"]): run for run in runs}
    rows: Rows = []
    differences: Differences = {}
    for recipe in RECIPES:
        seeds = sorted(seed for name, seed in values if name == recipe.name)
        if not seeds or base not in (recipe.name, recipe.base):
            continue
        row = [recipe.title, ", ".join(map(str, seeds))]
        for metric in METRIC_TITLES:
            row.append(mean_interval([values[recipe.name, seed][metric] for seed in seeds]).text())
        if recipe.name == base:
            rows.insert(0, [*row, "", "", ""])
            continue
        common = [seed for seed in seeds if (base, seed) in values]
        paired = _paired(values, recipe.name, base, common)
        if paired:
            differences[recipe.title] = paired
        rows.append([*row, *([i.text(signed=True) for i in paired.values()] or [""] * len(METRIC_TITLES))])
    return rows, differences


def _paired(values: Runs, name: str, other: str, seeds: list[int]) -> dict[str, Interval]:
    """Metric's title -> mean difference of two recipes over common seeds; empty where they have none."""
    if not seeds:
        return {}
    return {
        title: mean_interval([values[name, seed][metric] - values[other, seed][metric] for seed in seeds])
        for metric, title in METRIC_TITLES.items()
    }


def _rival_rows(runs: list[dict[str, Any]]) -> Rows:
    values = {(run["recipe"], run["seed"]): run for run in runs}
    titles = {recipe.name: recipe.title for recipe in RECIPES}
    rows: Rows = []
    for name, other in RIVALS:
        seeds = sorted(seed for recipe, seed in values if recipe == name and (other, seed) in values)
        if seeds:
            paired = _paired(values, name, other, seeds)
            cells = [interval.text(signed=True) for interval in paired.values()]
            rows.append([titles[name], titles[other], ", ".join(map(str, seeds)), *cells])
    return rows
