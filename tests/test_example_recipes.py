"""Options of examples/train.py that a comparison of losses needs: late ramps, branches, class weights, caches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_example_train import EPOCHS, STEPS_PER_EPOCH, VOID, arguments, rows, scores, weights, write_folder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import data
import options
import train
import unet

from semeda_fast import EdgeProxy


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    write_folder(root / "train", 4 * STEPS_PER_EPOCH, seed=0)
    write_folder(root / "val", 5, seed=1)
    EdgeProxy(3, seed=0).save(root / "proxy.safetensors")
    return root


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_a_branch_goes_on_from_another_runs_checkpoint(scenes: Path, tmp_path: Path) -> None:
    assert train.main(arguments(scenes, tmp_path / "ce", "--keep-epoch", "2", loss="ce")) == 0
    kept = tmp_path / "ce" / "checkpoint-2.pt"
    assert torch.load(kept, weights_only=True)["epoch"] == 2

    # The same loss: the branch ends where the whole run ended.
    assert train.main(arguments(scenes, tmp_path / "same", "--branch", str(kept), loss="ce")) == 0
    assert [int(row["step"]) for row in rows(tmp_path / "same", "train")] == [*range(13, 19)]
    assert scores(tmp_path / "same") == scores(tmp_path / "ce")

    late = ["--branch", str(kept), "--semeda-start", "2", "--semeda-ramp", "1", "--lambda-semeda", "0.3"]
    assert train.main(arguments(scenes, tmp_path / "late", *late)) == 0
    ramp = [float(row["lambda_semeda"]) for row in rows(tmp_path / "late", "train")]
    assert ramp == pytest.approx([0.3 * i / STEPS_PER_EPOCH for i in range(1, 7)], rel=1e-6)
    one, other = weights(tmp_path / "late"), weights(tmp_path / "ce")
    assert any(not torch.equal(one[name], other[name]) for name in one)

    # Before the term begins the run is the one without it: same samples, same weights.
    whole = ["--semeda-start", "2", "--semeda-ramp", "1", "--lambda-semeda", "0.3"]
    assert train.main(arguments(scenes, tmp_path / "whole", *whole)) == 0
    assert all(float(row["lambda_semeda"]) == 0 for row in rows(tmp_path / "whole", "train")[:12])
    before = [float(row["ce"]) for row in rows(tmp_path / "ce", "train")[:12]]
    assert [float(row["ce"]) for row in rows(tmp_path / "whole", "train")[:12]] == pytest.approx(before, rel=1e-3)


def test_a_missing_branch_is_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(scenes, tmp_path / "out", "--branch", str(tmp_path / "none.pt"))) == 2
    assert "none.pt" in capsys.readouterr().err


def test_a_resumed_branch_goes_on_with_its_own_checkpoint(scenes: Path, tmp_path: Path) -> None:
    assert train.main(arguments(scenes, tmp_path / "ce", "--keep-epoch", "1", loss="ce")) == 0
    branch = ["--branch", str(tmp_path / "ce" / "checkpoint-1.pt")]
    assert train.main(arguments(scenes, tmp_path / "late", *branch)) == 0
    done = weights(tmp_path / "late")
    assert train.main(arguments(scenes, tmp_path / "late", *branch, "--resume")) == 0
    again = weights(tmp_path / "late")
    assert all(torch.equal(done[name], again[name]) for name in done)


def test_a_trained_network_is_trained_further_by_a_new_run(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(scenes, tmp_path / "ce", loss="ce")) == 0
    kept = ["--weights", str(tmp_path / "ce" / "checkpoint.pt")]
    assert train.main(arguments(scenes, tmp_path / "more", *kept, "--lr", "1e-30", loss="ce")) == 0
    assert len(rows(tmp_path / "more", "train")) == EPOCHS * STEPS_PER_EPOCH  # from the first step, with a new schedule
    one, other = weights(tmp_path / "more"), weights(tmp_path / "ce")
    # A learning rate of nothing leaves the weights where they were.
    assert all(torch.equal(one[name], other[name]) for name in one if one[name].is_floating_point())

    missing = ["--weights", str(tmp_path / "none.pt")]
    assert train.main(arguments(scenes, tmp_path / "out", *missing)) == 2
    said = capsys.readouterr().err
    assert "none.pt is not a readable checkpoint" in said
    assert "remove" not in said  # somebody else's file
    assert not (tmp_path / "out").exists()  # so that the next try needs no --resume
    assert train.main(arguments(scenes, tmp_path / "more", "--weights", "gone.pt", "--resume", loss="ce")) == 2
    assert "cannot resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse_args(arguments(scenes, tmp_path / "out", *kept, "--branch", kept[1]), "")
    assert "give one of them" in capsys.readouterr().err


def test_class_weights_are_those_of_enet(scenes: Path, tmp_path: Path) -> None:
    args = options.parse_args(arguments(scenes, tmp_path / "out", "--class-weights", "enet"), "")
    dataset, _ = data.make_datasets(args)
    masks = np.stack([dataset.read(index)[1] for index in range(len(dataset))])
    shares = [(masks == label).sum() / (masks != VOID).sum() for label in range(3)]
    assert data.class_weights(dataset).tolist() == pytest.approx([1 / np.log(1.02 + s) for s in shares], rel=1e-6)
    for loss in ("ce", "ce+semeda"):
        more = ["--class-weights", "enet", "--epochs", "1"]
        assert train.main(arguments(scenes, tmp_path / loss, *more, loss=loss)) == 0
    weighted, both = (float(rows(tmp_path / loss, "train")[0]["ce"]) for loss in ("ce", "ce+semeda"))
    assert train.main(arguments(scenes, tmp_path / "plain", "--epochs", "1", loss="ce")) == 0
    assert weighted == pytest.approx(both, rel=1e-5)
    assert weighted != pytest.approx(float(rows(tmp_path / "plain", "train")[0]["ce"]), rel=1e-4)


def test_the_cache_changes_no_sample(scenes: Path, tmp_path: Path) -> None:
    plain, _ = data.make_datasets(options.parse_args(arguments(scenes, tmp_path, "--crop", "16x16"), ""))
    cached, _ = data.make_datasets(options.parse_args(arguments(scenes, tmp_path, "--crop", "16x16", "--cache"), ""))
    for key in ((0, 3), (1, 3), (0, 3)):
        for one, other in zip(plain[key], cached[key], strict=True):
            assert torch.equal(one, other)


def test_options_of_term_and_network_reach_it(scenes: Path, tmp_path: Path) -> None:
    more = ["--norm", "batch", "--depth", "2", "--channels-last", "--epochs", "1"]
    more += ["--layer-weights", "0,0,1", "--distance", "l2"]
    assert train.main(arguments(scenes, tmp_path / "out", *more)) == 0
    norms = [name for name in weights(tmp_path / "out") if name.endswith("running_mean")]
    assert len(norms) == 2 * (3 + 2)  # two a block, three blocks down and two up
    assert train.main(arguments(scenes, tmp_path / "plain", *more[:-4])) == 0
    one, other = (float(rows(tmp_path / name, "train")[0]["semeda"]) for name in ("out", "plain"))
    assert one != pytest.approx(other, rel=1e-3)


def test_widths_stop_growing_at_sixteen_times() -> None:
    network = unet.UNet(3, width=2, depth=6)
    assert network(torch.zeros(1, 3, 70, 66)).shape == (1, 3, 70, 66)
    assert max(parameter.shape[0] for parameter in network.parameters()) == 32


assert EPOCHS == 3  # what the branches above count on


@pytest.mark.parametrize("wrong", [("--semeda-power", "0"), ("--semeda-ramp", "-1"), ("--semeda-start", "nan")])
def test_a_ramp_that_is_none_is_refused_before_anything_is_written(
    scenes: Path, tmp_path: Path, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(arguments(scenes, tmp_path / "out", *wrong))
    assert "ramp expects" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
