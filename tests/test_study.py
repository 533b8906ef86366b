"""The accuracy study: its recipes and calls, what it collects, its statistics, and the page that shows it."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

import options  # noqa: E402

from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks.report import page  # noqa: E402
from benchmarks.statistics import mean_interval  # noqa: E402
from benchmarks.study import gradients  # noqa: E402
from benchmarks.study import runs as study  # noqa: E402
from benchmarks.study.recipes import BASES, RECIPES, Recipe  # noqa: E402
from benchmarks.suite.runner import RESULTS, Run, machine  # noqa: E402
from semeda_fast import SemedaLoss  # noqa: E402


def test_every_recipe_is_a_call_of_the_example(tmp_path: Path) -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    known = {recipe.name: recipe for recipe in RECIPES}
    for recipe in RECIPES:
        call = study.command_of(recipe, 3, tmp_path, tmp_path / "camvid")
        args = options.parse_args(call[2:], "")
        assert args.seed == 3
        assert args.output == tmp_path / f"{recipe.name}-s3"
        if not recipe.base:
            assert args.loss == "ce"
            assert not recipe.branch
            assert recipe.weights in ("", "wce")
            continue
        base = known[recipe.base]
        assert not base.base
        assert recipe.weights == base.weights
        assert recipe.branch in ("", base.name)
        plain = options.parse_args(study.command_of(base, 3, tmp_path, tmp_path / "camvid")[2:], "")
        if recipe.branch:
            assert args.branch == plain.output / f"checkpoint-{plain.keep_epoch}.pt"
        # Nothing but the SEMEDA term differs between a recipe and what it is compared with.
        may_differ = {"loss", "output", "branch", "keep_epoch", "semeda_start", "semeda_ramp", "semeda_power"}
        may_differ |= {"lambda_semeda", "layer_weights", "distance", "proxy"}
        may_differ |= {"class_weights"} if recipe.control else set()
        assert recipe.control == (args.loss == "ce" or recipe.proxy == "identity")
        for name, value in vars(plain).items():
            assert name in may_differ or getattr(args, name) == value, f"{recipe.name}: {name}"
        if recipe.weights:
            assert args.weights == tmp_path / "wce-s3" / "checkpoint.pt"
        if recipe.branch and args.loss != "ce":
            assert args.semeda_start >= plain.keep_epoch


def test_means_have_students_interval() -> None:
    for values in ([0.5, 0.6], [0.1, 0.4, 0.2, 0.9], [float(i * i) for i in range(10)]):
        found = mean_interval(values)
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), abs=2e-3 * found.half)
    assert mean_interval([0.25]).text() == "0.2500"
    assert math.isnan(mean_interval([0.25]).half)
    assert mean_interval([0.01, 0.03]).text(signed=True) == "+0.0200 ± 0.1271"
    assert not mean_interval([0.01, 0.03]).excludes_zero
    assert mean_interval([0.02, 0.0201, 0.0199]).excludes_zero
    with pytest.raises(ValueError, match="1 to 10 values, got 0"):
        mean_interval([])


def write_run(folder: Path, name: str, miou: float) -> None:
    (folder / name).mkdir(parents=True)
    report = {"miou": miou, "boundary_iou": miou / 2, "boundary_f": miou / 4, "class_iou": {"sky": 0.9}}
    (folder / name / "report.json").write_text(json.dumps(report))
    with (folder / name / "log.csv").open("w", newline="") as file:
        columns = ("kind", "epoch", "step", "ce", "semeda", "lambda_semeda", *study.METRICS)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in (40, 50, 100):
            values = {"ce": 1 / step, "semeda": 2.0, "lambda_semeda": 0.1}
            writer.writerow({"kind": "train", "epoch": 0, "step": step, **values})
        writer.writerow({"kind": "val", "epoch": 0, "step": 100, **dict.fromkeys(study.METRICS, miou)})


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study.json of two recipes over three seeds, in a folder of results."""
    recipes = (Recipe("plain", "plain training", ()), Recipe("more", "with more", ("--loss", "ce"), base="plain"))
    monkeypatch.setattr(study, "RECIPES", recipes)
    monkeypatch.setattr(page, "RECIPES", recipes)
    monkeypatch.setattr(page, "BASES", ("plain",))
    for seed, (plain, more) in enumerate([(0.5, 0.52), (0.6, 0.61), (0.4, 0.43)], start=1):
        write_run(tmp_path / "runs", f"plain-s{seed}", plain)
        write_run(tmp_path / "runs", f"more-s{seed}", more)
    write_run(tmp_path / "runs", "forgotten-s1", 0.1)
    assert study.main(["collect", str(tmp_path / "runs"), str(tmp_path / "results" / "camvid")]) == 0
    return tmp_path / "results"


def test_the_terms_pull_as_their_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 4, 12, 16), generator=generator)
    target = torch.randint(0, 3, (2, 12, 16), generator=generator)  # no pixel of class 3
    target[0, 0] = 255
    found = gradients.facts_of(logits, target, 4, 255)
    p = logits.softmax(dim=1)
    for label in range(3):
        members = target == label
        assert found["ce_pull"][label] == pytest.approx(float((1 - p[:, label])[members].mean()), abs=1e-3)
        assert found["share"][label] == pytest.approx(float(members.sum() / (target != 255).sum()), abs=1e-4)
    assert found["ce_pull"][3] is None
    assert found["terms"].keys() == gradients.TERMS.keys()
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, target, ignore_index=255).backward()
    other = logits.clone().requires_grad_()
    SemedaLoss(num_classes=4, ignore_index=255, lambda_ce=0, lambda_semeda=1, backend="reference")(
        other, target
    ).backward()
    assert leaf.grad is not None
    assert other.grad is not None
    ratio = float(other.grad.norm() / leaf.grad.norm())
    assert found["terms"]["all layers"]["norm_ratio"] == pytest.approx(ratio, rel=1e-3, abs=1e-3)
    cosine = float(F.cosine_similarity(other.grad.flatten(), leaf.grad.flatten(), dim=0))
    assert found["terms"]["all layers"]["cosine"] == pytest.approx(cosine, abs=1e-3)


def test_a_study_is_collected_from_reports_and_logs(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study.load(collected / "camvid" / study.STUDY)
    assert [(run["recipe"], run["seed"]) for run in found["runs"]] == [
        *(("more", seed) for seed in (1, 2, 3)),
        *(("plain", seed) for seed in (1, 2, 3)),
    ]
    first = found["runs"][0]
    assert (first["miou"], first["options"]) == (0.52, "--loss ce")
    assert first["curve"] == [[1, 0.52, 0.52, 0.52]]
    assert first["losses"] == [[50, 0.02, 2.0, 0.1], [100, 0.01, 2.0, 0.1]]
    assert study.main(["collect", str(collected), str(collected)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_runs_are_added_to_a_study(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "others", "more-s10", 0.7)
    write_run(tmp_path / "others", "plain-s2", 0.8)
    call = ["collect", "--add", str(tmp_path / "others"), str(collected / "camvid")]
    assert study.main(call) == 0
    found = {
        (run["recipe"], run["seed"]): run["miou"] for run in study.load(collected / "camvid" / study.STUDY)["runs"]
    }
    assert list(found) == [*(("more", seed) for seed in (1, 2, 3, 10)), *(("plain", seed) for seed in (1, 2, 3))]
    assert (found["more", 10], found["more", 1], found["plain", 2]) == (0.7, 0.52, 0.8)
    monkeypatch.setattr(study, "BRANCH_EPOCH", 3)
    assert study.main(call) == 2
    assert "made with branch_epoch 20, this one with 3" in capsys.readouterr().err


def test_gradients_of_an_added_study_are_those_of_the_first_seed() -> None:
    def of(*entries: tuple[str, int, str, int]) -> dict[str, Any]:
        keys = ("recipe", "seed", "when", "value")
        gradients = [dict(zip(keys, entry, strict=True)) for entry in entries]
        return {"training": [], "branch_epoch": 20, "runs": [], "gradients": gradients}

    earlier = of(("ce", 1, "trained", 1), ("wce", 3, "trained", 2), ("wce", 3, "untrained", 3))
    new = of(("wce", 2, "trained", 4), ("wce", 7, "untrained", 5), ("ce", 1, "trained", 6))
    found = {(g["recipe"], g["when"]): (g["seed"], g["value"]) for g in study.added(earlier, new)["gradients"]}
    assert found == {("ce", "trained"): (1, 6), ("wce", "trained"): (2, 4), ("wce", "untrained"): (3, 3)}


def test_the_page_shows_means_and_paired_differences(collected: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    target = tmp_path / "docs" / "results.md"
    target.write_text("By hand.\n\n<!-- made: accuracy camvid -->\nold\n<!-- end -->\n\nBy hand, too.\n")
    written = page.write_page(target, collected)
    text = target.read_text()
    assert text.startswith("By hand.\n")
    assert text.endswith("By hand, too.\n")
    assert "old" not in text
    assert "| plain training | 1, 2, 3 | 0.5000 ± 0.2484 |" in text
    spread = "0.1000 mIoU, 0.0500 boundary IoU, 0.0250 boundary F"
    assert f"Standard deviation between the 3 seeds of plain training: {spread}." in text
    differences = mean_interval([0.02, 0.01, 0.03])
    assert f"{differences.mean:+.4f} ± {differences.half:.4f}" in text
    assert [path.name for path in written] == ["results.md", "accuracy-camvid-plain.png"]
    assert page.write_page(target, collected) == written  # again, in the place of the same
    assert target.read_text() == text


def test_the_page_shows_overheads(tmp_path: Path) -> None:
    common = {"kind": "step", "suite": "steps", "group": "g", "status": "ok", "allocator": "default", "threads": 2}
    workload = {"dataset": "voc", "num_classes": 21, "batch": 2, "height": 512, "width": 512}
    network = {"network": "dpt_small", "title_network": "DPT", "workload": workload, "workload_name": "voc"}
    records: list[dict[str, Any]] = [
        {**common, **network, "contender": "ce", "title": "CE", "seconds": [1.0, 1.0], "loss_seconds": [0.1, 0.1]},
        {
            **common,
            **network,
            "contender": "cpu",
            "title": "CPU",
            "seconds": [1.02, 1.02],
            "loss_seconds": [0.13, 0.13],
        },
        {**common, **network, "contender": "bad", "title": "BAD", "status": "wrong", "reason": "off"},
        {**common, **network, "kind": "step-memory", "contender": "cpu", "title": "CPU", "above_inputs": 2**21},
    ]
    facts = {**machine.describe("cpu"), "threads": 2}
    (tmp_path / "results" / "here").mkdir(parents=True)
    Run("steps", "run --steps", facts, records=records, complete=True).save(tmp_path / "results" / "here")
    assert (tmp_path / "results" / "here" / RESULTS).is_file()
    target = tmp_path / "results.md"
    target.write_text("<!-- made: overhead here -->\n<!-- end -->\n")
    page.write_page(target, tmp_path / "results")
    text = target.read_text()
    assert "| DPT | 1000 | 2.00 | +2.0 % [+2.0 %, +2.0 %] | +3.0 % | WRONG: off |" in text
    assert "| DPT | 2 |" in text
    assert "not complete" not in text

    plans = [{"name": "a", "state": "done", "problem": ""}, {"name": "b", "state": "left out", "problem": "no time"}]
    Run("steps", "", facts, records=records, plans=plans).save(tmp_path / "results" / "here")
    page.write_page(target, tmp_path / "results")
    assert "**This run is not complete.** It lacks b (no time).\n" in target.read_text()


def test_marks_that_cannot_be_filled_are_errors(tmp_path: Path) -> None:
    target = tmp_path / "results.md"
    target.write_text("no marks")
    with pytest.raises(ValueError, match="has no part marked"):
        page.write_page(target, tmp_path)
    target.write_text("<!-- made: weather here -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"'<!-- made: weather \.\.\. -->' is none of overhead, accuracy"):
        page.write_page(target, tmp_path)
    target.write_text("<!-- made: accuracy nowhere -->\n<!-- end -->")
    with pytest.raises(FileNotFoundError):
        page.write_page(target, tmp_path)
    assert "made: accuracy nowhere" in target.read_text()


def test_the_committed_page_is_what_its_results_make(tmp_path: Path) -> None:
    """So nobody edits a number by hand, and no result is stored without being shown."""
    copy = tmp_path / "results.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    written = page.write_page(copy)
    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8")
    for path in written[1:]:
        assert (page.PAGE.parent / "results" / path.name).is_file(), path.name
    assert command_line.parser().parse_args(["page"]).command == "page"


def test_runs_come_before_their_branches_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    camvid = tmp_path / "camvid"
    (camvid / "train" / "images").mkdir(parents=True)
    monkeypatch.setenv("SEMEDA_FAST_CAMVID", str(camvid))
    (tmp_path / "out" / "done-s1").mkdir(parents=True)
    (tmp_path / "out" / "done-s1" / "report.json").write_text("{}")
    log = tmp_path / "calls"
    script = f"import sys; open({str(log)!r}, 'a').write(sys.argv[1] + chr(10)); sys.exit(sys.argv[1] == 'late-s2')"

    def fake(recipe: Recipe, seed: int, folder: Path, data: Path) -> list[str]:
        return [sys.executable, "-c", script, study.run_name(recipe, seed)]

    monkeypatch.setattr(study, "command_of", fake)
    recipes = (Recipe("late", "", (), "early", branch="early"), Recipe("early", "", ()), Recipe("done", "", ()))
    assert study.run_all(recipes, [1], tmp_path / "out", jobs=2) == []
    assert log.read_text().split() == ["early-s1", "late-s1"]
    assert study.run_all(recipes[:1], [2], tmp_path / "out", jobs=1) == ["late-s2"]
    assert "late-s2: exit code 1, see logs/late-s2.log" in capsys.readouterr().err


def test_without_camvid_the_study_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMEDA_FAST_CAMVID", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no CamVid .* set SEMEDA_FAST_CAMVID"):
        study.run_all(RECIPES[:1], [1], tmp_path, 1)
    assert study.main(["run", "--output", str(tmp_path), "--only", "no such recipe"]) == 2
    assert tuple(recipe.name for recipe in RECIPES if not recipe.base) == BASES
