"""Whether SEMEDA pays: many runs of examples/train.py on CamVid, with and without it, with the same seeds.

    python -m benchmarks.study run --output build/study [--only REGEX] [--seeds 1,2,3] [--jobs 2]
    python -m benchmarks.study collect build/study benchmarks/results/NAME   # study.json, which docs/evidence.md shows
    python -m benchmarks.study collect --add build/more benchmarks/results/NAME   # beside the runs that are in it

A run that has its report is not run again, and one that was interrupted goes on, so the study can be stopped at any
moment. Recipes that begin late start from the cross-entropy run of the same seed, at the epoch where they begin: up to
there they would be the same.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from semeda_fast.files import atomic_path

from .. import machine
from ..labels import CAMVID_VARIABLE, camvid_folder
from ..suite.runner import TUNED
from .gradients import gradient_facts
from .proxies import make_proxy, proxy_path
from .recipes import BRANCH_EPOCH, RECIPES, TRAINING, Recipe

SCHEMA = 1
STUDY = "study.json"
CLASSES = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
METRICS = ("miou", "boundary_iou", "boundary_f")
_ROOT = Path(__file__).resolve().parents[2]


def command_of(recipe: Recipe, seed: int, folder: Path, data: Path) -> list[str]:
    """The call of examples/train.py for one run; `folder` is that of the whole study."""
    options = [
        *("--images", data / "train/images", "--masks", data / "train/masks"),
        *("--val-images", data / "val/images", "--val-masks", data / "val/masks"),
        *("--num-classes", 11, "--ignore-index", 11, "--class-names", CLASSES),
        *TRAINING,
        *("--seed", seed, "--output", folder / run_name(recipe, seed)),
        *recipe.options,
    ]
    if recipe.proxy:
        options += ["--proxy", proxy_path(folder, recipe.proxy)]
    if recipe.branch:
        options += ["--branch", folder / f"{recipe.branch}-s{seed}" / f"checkpoint-{BRANCH_EPOCH}.pt"]
    elif recipe.weights:
        options += ["--weights", folder / f"{recipe.weights}-s{seed}" / "checkpoint.pt"]
    else:
        options += ["--keep-epoch", BRANCH_EPOCH]
    return [sys.executable, str(_ROOT / "examples" / "train.py"), *map(str, options)]


def run_name(recipe: Recipe, seed: int) -> str:
    """Of the run's folder."""
    return f"{recipe.name}-s{seed}"


def run_all(recipes: Sequence[Recipe], seeds: Sequence[int], folder: Path, jobs: int) -> list[str]:
    """All runs that have no report yet, `jobs` at a time; the names of those that failed.

    Raises:
        FileNotFoundError: CamVid is not there.
    """
    data = camvid_folder()
    if not (data / "train" / "images").is_dir():
        raise FileNotFoundError(
            f"{data} holds no CamVid (train/images, train/masks, val/images, val/masks); set {CAMVID_VARIABLE}"
        )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **TUNED, "OMP_NUM_THREADS": str(max(1, machine.available_cores() // jobs))}

    for name in sorted({recipe.proxy for recipe in recipes if recipe.proxy}):
        make_proxy(name, folder, data)

    def one(job: tuple[Recipe, int]) -> str:
        recipe, seed = job
        name = run_name(recipe, seed)
        if (folder / name / "report.json").is_file():
            return ""
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [*command_of(recipe, seed, folder, data), "--resume"]
        with (folder / "logs" / f"{name}.log").open("w", encoding="utf-8") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        print(f"{name}: {'done' if code == 0 else f'exit code {code}, see logs/{name}.log'}", file=sys.stderr)
        return "" if code == 0 else name

    failed: list[str] = []
    for late in (False, True):  # those that start from another one's checkpoint come after it
        todo = [(recipe, seed) for recipe in recipes for seed in seeds if bool(recipe.follows) == late]
        with ThreadPoolExecutor(jobs) as pool:
            failed += [name for name in pool.map(one, todo) if name]
    return failed


def collect(folder: Path) -> dict[str, Any]:
    """What docs/evidence.md needs of all finished runs in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = list(_finished(folder))
    if not runs:
        raise FileNotFoundError(f"{folder} holds no finished run (NAME-sSEED/report.json); run the study first")
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "machine": machine.describe("cpu"),
        "training": [str(option) for option in TRAINING],
        "branch_epoch": BRANCH_EPOCH,
        "gradients": list(_gradients(folder)),
        "runs": runs,
    }


def added(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A study with the runs of both; of a run that both have, the new one.

    Raises:
        ValueError: they were not trained alike.
    """
    for key in ("training", "branch_epoch"):
        if earlier[key] != new[key]:
            raise ValueError(f"the study to add to was made with {key} {earlier[key]}, this one with {new[key]}")

    runs = {(run["recipe"], run["seed"]): run for run in (*earlier["runs"], *new["runs"])}
    gradients: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in (*earlier["gradients"], *new["gradients"]):
        of = entry["recipe"], entry["when"]
        if of not in gradients or entry["seed"] <= gradients[of]["seed"]:  # of the first seed, as `_gradients` has it
            gradients[of] = entry
    return {**new, "gradients": list(gradients.values()), "runs": [runs[key] for key in sorted(runs)]}


def _finished(folder: Path) -> Iterator[dict[str, Any]]:
    known = {recipe.name: recipe for recipe in RECIPES}
    for path in sorted(folder.glob("*-s*/report.json")):
        name, _, seed = path.parent.name.rpartition("-s")
        if name not in known:
            print(f"note: {path.parent.name} is of no recipe in recipes.py and is left out", file=sys.stderr)
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        with (path.parent / "log.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        yield {
            "recipe": name,
            "seed": int(seed),
            "options": shlex.join(map(str, known[name].options)),
            **{metric: report[metric] for metric in METRICS},
            "class_iou": report["class_iou"],
            "curve": [[int(r["epoch"]) + 1, *(_short(r[metric]) for metric in METRICS)] for r in rows if r["miou"]],
            "losses": [[int(r["step"]), _short(r["ce"]), _short(r["semeda"]), _short(r["lambda_semeda"])]
                       for r in rows if r["kind"] == "train" and int(r["step"]) % 50 == 0],
        }  # fmt: skip


def _gradients(folder: Path) -> Iterator[dict[str, Any]]:
    """How the terms pull before, late in and after the training without SEMEDA, of the first seed."""
    when = {"untrained": "", f"epoch {BRANCH_EPOCH}": f"checkpoint-{BRANCH_EPOCH}.pt", "trained": "checkpoint.pt"}
    for recipe in RECIPES:
        runs = sorted(folder.glob(f"{recipe.name}-s*/checkpoint-{BRANCH_EPOCH}.pt"))
        if recipe.base or not runs or not camvid_folder().is_dir():
            continue
        seed = int(runs[0].parent.name.rpartition("-s")[2])
        command = command_of(recipe, seed, folder, camvid_folder())[2:]
        for moment, name in when.items():
            path = runs[0].parent / name if name else None
            yield {"recipe": recipe.name, "seed": seed, "when": moment, **gradient_facts(command, path)}


def _short(text: str) -> float:
    return float(f"{float(text):.5g}")


def load(path: Path) -> dict[str, Any]:
    """A study.json.

    Raises:
        ValueError: it is of another schema.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a study of schema {SCHEMA}, got {found.get('schema')}; collect it again")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1: a run failed; 2: a bad call."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.study", description="The accuracy study on CamVid.")
    commands = top.add_subparsers(dest="command", required=True)
    start = commands.add_parser("run", help="train what is not there yet; hours")
    start.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder for all runs")
    start.add_argument(
        "--only", default="", metavar="REGEX", help="recipes whose name this matches (and what they need)"
    )
    start.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3, 4])
    start.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores (2)")
    gather = commands.add_parser("collect", help="write study.json from the runs' reports and logs")
    gather.add_argument("--add", action="store_true", help="keep what the study.json there has beside these runs")
    gather.add_argument("runs", type=Path)
    gather.add_argument("output", type=Path)
    options = top.parse_args(arguments)
    try:
        if options.command == "collect":
            found = collect(options.runs)
            if options.add:
                found = added(load(options.output / STUDY), found)
            options.output.mkdir(parents=True, exist_ok=True)
            with atomic_path(options.output / STUDY, overwrite=True) as temporary:
                temporary.write_text(compact(found), encoding="utf-8")
            print(options.output / STUDY)
            return 0
        chosen = [recipe for recipe in RECIPES if re.search(options.only, recipe.name)]
        if not chosen:
            raise ValueError(f"no recipe matches {options.only!r}: {', '.join(recipe.name for recipe in RECIPES)}")
        needed = {recipe.follows for recipe in chosen}
        chosen += [recipe for recipe in RECIPES if recipe.name in needed and recipe not in chosen]
        failed = run_all(chosen, options.seeds, options.output.resolve(), options.jobs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(failed))


def compact(found: dict[str, Any]) -> str:
    """JSON with one line a run, so that a difference between two studies can be read."""
    head = json.dumps({key: value for key, value in found.items() if key != "runs"}, indent=1)
    lines = ",\n  ".join(json.dumps(run) for run in found["runs"])
    return f'{head[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n'
