"""What would make a training of no use is found before it; a proxy that learnt little says so, and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_fixtures import TINY, scenes, write_folder
from typer.testing import CliRunner

from semeda_fast import EdgeProxy, cli, train_proxy
from semeda_fast.errors import ProxyWarning
from semeda_fast.proxy import MaskFolder, training


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any) -> None:
        raise AssertionError("the training has begun")

    monkeypatch.setattr(training, "perturbed", trained)


def flat(count: int = 3) -> torch.Tensor:
    """Masks of one class each."""
    return torch.arange(count)[:, None, None].expand(count, 40, 40).contiguous()


# ----------------------------------------------------------------------------------------------------
# Edges


def test_masks_without_an_edge(no_training: None, tmp_path: Path) -> None:
    for masks in (flat(), write_folder(tmp_path / "masks", flat())):
        with pytest.raises(ValueError, match=r"the masks hold no edge: in none of the 2 do two classes.*num_classes"):
            train_proxy(masks, 4, **TINY)


def test_edges_that_no_crop_would_show(no_training: None) -> None:
    with pytest.raises(ValueError, match=r"no crop .* holds an edge, though the masks do: 20 crops of 1x1.*crop_size"):
        train_proxy(scenes(4), 4, **{**TINY, "crop_size": 1})
    with pytest.raises(AssertionError, match="has begun"):  # the advice
        train_proxy(scenes(4), 4, **{**TINY, "crop_size": 12})


def test_one_edge_far_into_the_training_is_enough() -> None:
    masks = torch.zeros(1, 200, 200, dtype=torch.int64)
    masks[0, 100, 100] = 1
    proxy = train_proxy(masks, 4, val_masks=scenes(2), **{**TINY, "steps": 200, "batch_size": 1})
    assert proxy.provenance["steps"] == 200


def test_held_out_masks_without_an_edge_are_named_before_the_training(no_training: None) -> None:
    with (
        pytest.warns(ProxyWarning, match="the held-out masks hold no edge.*give val_masks with edges") as caught,
        pytest.raises(AssertionError, match="has begun"),
    ):
        train_proxy(scenes(4), 4, val_masks=flat(), **TINY)
    assert [warning.filename for warning in caught] == [__file__]


def test_held_out_masks_without_an_edge_are_named_once() -> None:
    with pytest.warns(ProxyWarning) as caught:
        proxy = train_proxy(scenes(4), 4, val_masks=flat(), **TINY)
    assert len(caught) == 1
    assert proxy.quality["edge_f1"] == 0


# ----------------------------------------------------------------------------------------------------
# A proxy of little use


def test_a_weak_proxy_is_a_warning_and_its_advice_works() -> None:
    masks = scenes(24)
    with pytest.warns(ProxyWarning, match=r"F1 of 0\.\d+ only .*train longer \(steps is 5\), try another lr") as caught:
        weak = train_proxy(masks, 4, **TINY)
    assert [warning.filename for warning in caught] == [__file__]
    assert weak.quality["edge_f1"] < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        better = train_proxy(masks, 4, steps=60, batch_size=8, crop_size=32, progress=False)
    assert better.quality["edge_f1"] > 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 50.0}, r"leave temperature at 'auto' \(it is 50.0\)"),
        ({"noise": 5.0}, r"less noise \(it is 5.0\)"),
    ],
)
def test_the_advice_names_what_was_changed(change: dict[str, Any], words: str) -> None:
    with pytest.warns(ProxyWarning, match=words):
        train_proxy(scenes(4), 4, **TINY, **change)


# ----------------------------------------------------------------------------------------------------
# The command

OPTIONS = ["--num-classes=4", "--batch-size=4", "--crop-size=12", "--widths=4,6", "--steps=5"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments], prog_name="semeda-fast")


def test_the_command_prints_the_warning_and_writes(tmp_path: Path) -> None:
    masks, output = write_folder(tmp_path / "masks", scenes(4)), tmp_path / "proxy.safetensors"
    before = warnings.showwarning
    result = run("train-proxy", masks, *OPTIONS, f"--output={output}")
    assert result.exit_code == 0, result.output
    quality = EdgeProxy.load(output).quality
    assert f"edge F1 {quality['edge_f1']:.4f}" in result.stdout
    lines = [line for line in result.stderr.splitlines() if "warning" in line.lower()]
    assert len(lines) == 1
    assert lines[0].startswith("semeda-fast: warning: the proxy finds the edges of the held-out masks with an F1 of")
    assert "train longer (steps is 5)" in lines[0]
    assert warnings.showwarning is before


def test_the_command_names_missing_edges_before_it_trains(no_training: None, tmp_path: Path) -> None:
    masks, output = write_folder(tmp_path / "masks", flat()), tmp_path / "proxy.safetensors"
    result = run("train-proxy", masks, *OPTIONS, f"--output={output}")
    assert result.exit_code == 2
    assert "semeda-fast: error: the masks hold no edge" in result.stderr
    assert not output.exists()


def test_a_pattern_chooses_files_of_both_folders(tmp_path: Path) -> None:
    """As in Cityscapes, where label maps lie beside colours and instances."""
    folders = [write_folder(tmp_path / name, scenes(4, seed=seed)) for seed, name in enumerate(("train", "val"))]
    for folder in folders:
        for path in list(folder.iterdir()):
            path.rename(folder / f"{path.stem}_labelIds.png")
            Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / f"{path.stem}_color.png")
    output = tmp_path / "proxy.safetensors"
    arguments = ["train-proxy", folders[0], "--val-masks", folders[1], *OPTIONS, f"--output={output}"]
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "_color.png" in refused.stderr
    assert "--pattern" in refused.stderr
    result = run(*arguments, "--pattern", "*_labelIds.png")
    assert result.exit_code == 0, result.output
    proxy = EdgeProxy.load(output)
    assert proxy.provenance["mask_count"] == 4
    assert proxy.quality["masks"] == 4
    assert proxy.provenance["masks"] == f"folder {tmp_path.name}/train, pattern '*_labelIds.png'"
    same = train_proxy(
        MaskFolder(folders[0], num_classes=4, pattern="*_labelIds.png"),
        4,
        val_masks=MaskFolder(folders[1], num_classes=4, pattern="*_labelIds.png"),
        **TINY,
    )
    assert all(torch.equal(a, b) for a, b in zip(same.weights, proxy.weights, strict=True))
    nothing = run(*arguments, "--overwrite", "--pattern", "*_seg.png")
    assert nothing.exit_code == 2
    assert "pattern '*_seg.png'" in nothing.stderr


def test_a_pattern_and_a_wrong_label(tmp_path: Path) -> None:
    masks = write_folder(tmp_path / "masks", scenes(4))
    arguments = ["train-proxy", masks, *OPTIONS, f"--output={tmp_path / 'p.safetensors'}", "--pattern=*.png"]
    result = run(*arguments, "--num-classes=2")
    assert result.exit_code == 2
    assert "values that are no labels" in result.stderr
