"""The command line: good runs, every kind of bad input with its exit code, and the picture."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from semeda_fast import EdgeProxy, SemedaLoss, __version__, cli, files, train_proxy
from semeda_fast.inspection import PALETTE, Inspection, damaged_labels, draw, inspect_mask, report

ROOT = Path(__file__).parents[1]
CAMVID_MASK = ROOT.parent / "shared/data/camvid/val/masks/0016E5_08007.png"
VOID = 255


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments], prog_name="semeda-fast")


def scene(seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Three classes: ground, a box, a thin pole; a void corner."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    top, left = rng.integers(4, 12, 2)
    mask[top : top + 20, left : left + 24] = 1
    mask[6:44, 50 : 50 + 2] = 2
    mask[-5:, :9] = VOID
    return mask


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    for number in range(4):
        Image.fromarray(scene(number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(masks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A proxy made by the command, run in two processes on the CPU, and what the command printed."""
    path = tmp_path_factory.mktemp("proxy") / "proxy.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        "-m",
        "semeda_fast.cli",
        "train-proxy",
        str(masks),
        "--num-classes=3",
        f"--ignore-index={VOID}",
    ]
    options = [
        "--widths=8,12",
        "--steps=40",
        "--batch-size=4",
        "--crop-size=32",
        "--seed=3",
        f"--output={path}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *command, *options], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


# ----------------------------------------------------------------------------- train-proxy


def test_train_proxy_writes_what_it_says(trained: tuple[Path, str]) -> None:
    path, printed = trained
    proxy = EdgeProxy.load(path)
    assert proxy.widths == (8, 12)
    assert proxy.provenance["steps"] == 40
    assert proxy.provenance["seed"] == 3
    for words in (
        f"edge F1 {proxy.quality['edge_f1']:.4f}",
        f"precision {proxy.quality['edge_precision']:.4f}",
        f"recall {proxy.quality['edge_recall']:.4f}",
        str(path),
        f"{path.stat().st_size / 1000:.1f} kB",
        "3 -> 8 -> 12 -> 2",
    ):
        assert printed.count(words) == 1  # by the main process only
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file stays


class Recorder:
    """Stands in for train_proxy and keeps its arguments."""

    def __init__(self, outcome: BaseException | None = None) -> None:
        self.outcome = outcome
        self.arguments: dict[str, Any] = {}
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> EdgeProxy:
        self.calls += 1
        bound = inspect.signature(train_proxy).bind(*args, **options)
        bound.apply_defaults()
        self.arguments = bound.arguments
        if self.outcome is not None:
            raise self.outcome
        proxy = EdgeProxy(3)
        proxy.quality = {"edge_f1": 0.5, "edge_precision": 0.5, "edge_recall": 0.5}
        return proxy


def test_defaults_are_those_of_train_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder()
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", recorder)
    result = run("train-proxy", "masks", "--num-classes", 3, "--output", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.output
    assert recorder.arguments.pop("masks") == Path("masks")
    assert recorder.arguments.pop("num_classes") == 3
    expected = {
        name: parameter.default
        for name, parameter in inspect.signature(train_proxy).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert recorder.arguments == expected


def test_options_reach_train_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder()
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", recorder)
    given = {
        "ignore_index": 255,
        "val_masks": Path("held"),
        "val_fraction": 0.25,
        "widths": (4, 5, 6),
        "tap": "post",
        "distance": "l2",
        "radius": 2,
        "void": "nearest",
        "noise": 0.5,
        "temperature": 0.7,
        "steps": 7,
        "batch_size": 3,
        "crop_size": 11,
        "lr": 0.5,
        "seed": 9,
    }
    options: list[object] = []
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        options += ["--" + name.replace("_", "-"), text]
    result = run("train-proxy", "m", "--num-classes", 3, "--output", tmp_path / "p.safetensors", *options)
    assert result.exit_code == 0, result.output
    assert {name: recorder.arguments[name] for name in given} == given


def refused(result: Any, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_output_is_checked_before_training(monkeypatch: pytest.MonkeyPatch, masks: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", recorder)

    def train(output: Path, *options: str) -> Any:
        return run("train-proxy", masks, "--num-classes", 3, "--output", output, *options)

    there = tmp_path / "there.safetensors"
    there.write_bytes(b"precious")
    refused(train(there), str(there), "exists already", "--overwrite")
    assert there.read_bytes() == b"precious"
    refused(train(tmp_path / "no" / "p.safetensors"), "folder", str(tmp_path / "no"), "does not exist")
    refused(train(tmp_path / "p.pt"), "should end in .safetensors")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refused(train(folder, "--overwrite"), "is a folder")
    assert recorder.calls == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.safetensors", "there.safetensors"]
    result = train(there, "--overwrite")
    assert result.exit_code == 0, result.output
    assert EdgeProxy.load(there).num_classes == 3


def test_unwritable_folder(monkeypatch: pytest.MonkeyPatch, masks: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", recorder)
    # Taking the permission away does not stop the superuser, so the question is answered for it.
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    output = tmp_path / "p.safetensors"
    refused(run("train-proxy", masks, "--num-classes", 3, "--output", output), "no permission", str(tmp_path))
    assert recorder.calls == 0
    picture = tmp_path / "p.png"
    refused(run("inspect", masks / "0.png", "--output", picture), "no permission", str(tmp_path))


def test_bad_masks_are_named(masks: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    output = tmp_path / "p.safetensors"

    def train(folder: Path, *options: object) -> Any:
        return run("train-proxy", folder, "--num-classes", 3, "--output", output, "--steps", 2, *options)

    refused(train(tmp_path / "nowhere"), str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(train(empty), str(empty))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    bad = scene()
    bad[3, 3] = 77
    Image.fromarray(bad).save(wrong / "bad.png")
    refused(train(wrong, "--ignore-index", VOID), "bad.png", "77")
    refused(train(masks), ".png", "255")  # void not declared
    torn = tmp_path / "torn"
    torn.mkdir()
    whole = (masks / "0.png").read_bytes()
    (torn / "torn.png").write_bytes(whole[: len(whole) // 2])
    refused(train(torn, "--ignore-index", VOID), "torn.png")
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--widths", "16,many"], "--widths"),
        (["--tap", "middle"], "tap must be"),
        (["--distance", "l3"], "distance must be"),
        (["--void", "ignore"], "void must be"),
        (["--temperature", "warm"], "temperature must be"),
        (["--steps", 0], "steps"),
        (["--val-fraction", 1.5], "val_fraction"),
        (["--step", "1"], "No such option"),
        (["--steps", "few"], "--steps"),
    ],
)
def test_bad_options_are_named(masks: Path, tmp_path: Path, options: list[object], words: str) -> None:
    output = tmp_path / "p.safetensors"
    arguments = [
        "train-proxy",
        masks,
        "--num-classes",
        3,
        "--ignore-index",
        VOID,
        "--output",
        output,
        *options,
    ]
    refused(run(*arguments), words)
    assert not output.exists()


def test_missing_arguments() -> None:
    refused(run("train-proxy"), "MASKS")
    refused(run("train-proxy", "m", "--output", "p.safetensors"), "--num-classes")
    refused(run("inspect", "m.png"), "--output")
    refused(run("fly"), "fly")


def test_ctrl_c_and_unexpected_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["train-proxy", "m", "--num-classes", 3, "--output", tmp_path / "p.safetensors"]
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", Recorder(KeyboardInterrupt()))
    refused(run(*arguments), "interrupted", code=130)
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", Recorder(ZeroDivisionError("oops")))
    refused(run(*arguments), "unexpected ZeroDivisionError: oops", "--debug", code=1)
    result = run(*arguments, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    monkeypatch.setattr("semeda_fast.proxy.training.train_proxy", Recorder(ValueError("no good")))
    refused(run(*arguments), "error: no good")
    result = run(*arguments, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- info


def test_info_in_words(trained: tuple[Path, str]) -> None:
    path, _ = trained
    result = run("info", path)
    assert result.exit_code == 0, result.output
    for words in (
        f"semeda_fast {__version__}, torch {torch.__version__}, python ",
        "triton",
        "reference",
        "bundled proxy",
        "3 -> 8 -> 12 -> 2",
        "edge_f1",
        "crop_size",
        "smooth_l1",
    ):
        assert words in result.stdout


def test_info_of_bad_proxies(trained: tuple[Path, str], masks: Path, tmp_path: Path) -> None:
    path, _ = trained
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-100])
    refused(run("info", torn), str(torn), "truncated")
    refused(run("info", tmp_path / "none.safetensors"), "none.safetensors")
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickled)
    refused(run("info", pickled), "pickle")
    for bad in (torn, pickled):
        picture = tmp_path / "p.png"
        refused(
            run("inspect", masks / "0.png", "--output", picture, "--proxy", bad, "--ignore-index", VOID),
            bad.name,
        )
        assert not picture.exists()


def test_info_survives_a_missing_bundled_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("semeda_fast.proxy.storage.BUNDLED", tmp_path / "gone.safetensors")
    result = run("info", "--json")
    assert result.exit_code == 0, result.output
    assert "gone.safetensors" in json.loads(result.stdout)["bundled_proxy"]["error"]


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == __version__
    for command in ((), ("train-proxy",), ("info",), ("inspect",)):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage: semeda-fast" in result.stdout


def test_info_as_json(trained: tuple[Path, str]) -> None:
    path, _ = trained
    result = run("info", path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert {status["name"] for status in facts["backends"]["backends"]} >= {
        "reference",
        "cpu",
        "triton",
        "cuda",
    }
    proxy = EdgeProxy.load(path)
    described = facts["proxy"]
    assert described["bytes"] == path.stat().st_size
    assert [layer["out_channels"] for layer in described["layers"]] == [8, 12, 2]
    assert described["scales"] == {name: list(values) for name, values in proxy.scales.items()}
    assert described["provenance"] == proxy.provenance
    assert described["quality"] == proxy.quality
    assert described["tap"] == "pre"
    assert described["parameters"] == 3 * 8 * 9 + 8 + 8 * 12 * 9 + 12 + 12 * 2 * 9 + 2


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from semeda_fast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("semeda-fast: ")
    assert "pip install 'semeda-fast[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------- inspect


def test_inspect_draws_a_picture(masks: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = [
        "inspect",
        masks / "0.png",
        "--output",
        picture,
        "--proxy",
        trained[0],
        "--ignore-index",
        VOID,
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert str(picture) in result.stdout
    assert "of SEMEDA term" in result.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800
        colours = {tuple(colour[:3]) for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in PALETTE[:3]} <= colours
    before = picture.read_bytes()
    refused(run(*arguments), "exists already")
    assert picture.read_bytes() == before
    assert run(*arguments, "--overwrite").exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_inspect_counts_classes_for_the_bundled_proxy(
    monkeypatch: pytest.MonkeyPatch, masks: Path, tmp_path: Path
) -> None:
    asked: list[int] = []

    def bundled(num_classes: int) -> EdgeProxy:
        asked.append(num_classes)
        return EdgeProxy(num_classes)

    monkeypatch.setattr(EdgeProxy, "bundled", staticmethod(bundled))
    monkeypatch.setattr("semeda_fast.inspection.draw", lambda *args, **options: None)
    arguments = ["inspect", masks / "0.png", "--output", tmp_path / "p.png", "--ignore-index", VOID]
    for options in ([], ["--num-classes", 19]):
        result = run(*arguments, *options)
        assert result.exit_code == 0, result.output
    assert asked == [3, 19]


def test_inspect_refuses_bad_input(masks: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    mask, proxy = masks / "0.png", ["--proxy", trained[0]]

    def look(path: Path, *options: object, output: Path = picture) -> Any:
        return run("inspect", path, "--output", output, *options)

    refused(look(tmp_path / "none.png", *proxy), "none.png")
    refused(look(mask, *proxy), "0.png", "255")
    refused(look(mask), "0.png", "--ignore-index 255")
    refused(look(mask, *proxy, "--num-classes", 5), "3 classes", "--num-classes is 5")
    refused(look(mask, *proxy, output=tmp_path / "p.gif3"), "'.gif3'", ".png")
    refused(look(mask, *proxy, output=tmp_path / "no" / "p.png"), "does not exist")
    torn = tmp_path / "torn.png"
    torn.write_bytes(mask.read_bytes()[:40])
    refused(look(torn, *proxy), "torn.png")
    assert [file.name for file in tmp_path.iterdir()] == ["torn.png"]


def test_inspect_without_matplotlib(monkeypatch: pytest.MonkeyPatch, masks: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", masks / "0.png", "--output", tmp_path / "p.png", "--ignore-index", VOID)
    refused(result, "pip install 'semeda-fast[plot]'")


def test_damage_is_where_it_is_said_to_be() -> None:
    labels = torch.as_tensor(scene().astype(np.int64))
    valid = labels != VOID
    clean = labels.where(valid, 0)
    before = clean.clone()
    predicted, damages = damaged_labels(clean, valid, 3)
    assert torch.equal(clean, before)
    again, _ = damaged_labels(clean, valid, 3)
    assert torch.equal(predicted, again)
    wrong = (predicted != clean) & valid
    assert np.array_equal(np.any([damage.pixels for damage in damages], axis=0), wrong.numpy())
    assert sum(damage.pixels.sum() for damage in damages) == wrong.sum()  # they do not overlap
    assert [damage.name.split(" ")[0] for damage in damages] == ["left", "class", "disk"]
    assert damages[1].name.startswith("class 2 ")  # the pole, 2 pixels wide
    assert not (predicted[:, 32:] == 2).any()
    assert not damages[0].pixels[:, 32:].any()
    assert not damages[1].pixels[:, :32].any()


def test_maps_are_the_loss_and_its_gradient(trained: tuple[Path, str]) -> None:
    proxy = EdgeProxy.load(trained[0])
    mask = scene()
    result = inspect_mask(mask, proxy, ignore_index=VOID)
    void = mask == VOID
    assert (result.semeda[void] == 0).all()
    assert (result.gradient[void] == 0).all()
    assert (result.semeda[~void] >= 0).all()
    assert result.mean_semeda == pytest.approx(result.semeda.sum() / (~void).sum(), rel=1e-5)
    # The same figure from the loss itself, fed with the prediction's log-probabilities.
    from semeda_fast.inspection import _soften

    target = torch.as_tensor(mask.astype(np.int64))
    truth = torch.where(target != VOID, target, torch.as_tensor(result.predicted))
    logits = _soften(torch.as_tensor(result.predicted), truth, 3).requires_grad_()
    assert torch.allclose(logits.exp().sum(1), torch.ones(1, *mask.shape), atol=1e-5)
    loss = SemedaLoss(proxy, lambda_ce=0.0, lambda_semeda=1.0, ignore_index=VOID)(logits, target[None])
    assert result.mean_semeda == pytest.approx(loss.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss * (~void).sum(), logits)
    np.testing.assert_allclose(result.gradient, grad[0].norm(dim=0), rtol=1e-4, atol=1e-6)
    # The loss sees the damage: its pixels hold far more of term and gradient than of the image.
    total = [sum(getattr(d, name) for d in result.damages) for name in ("share_of_area", "share_of_semeda")]
    assert total[1] > 2 * total[0]
    assert all(damage.share_of_gradient > damage.share_of_area for damage in result.damages)
    assert result.edge_probability[result.edges].mean() > result.edge_probability[~result.edges & ~void].mean()


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((1, 1), np.int16),
        np.full((1, 1), VOID),
        np.full((6, 9), VOID, np.uint8),
        np.full((30, 20), 1),
        np.array([[0, 1, 2, 1]]),
        np.arange(12).reshape(4, 3) % 3,
    ],
    ids=["pixel", "void-pixel", "all-void", "one-class", "row", "tiny"],
)
def test_odd_masks_give_a_picture(mask: np.ndarray, tmp_path: Path) -> None:
    result = inspect_mask(mask, EdgeProxy(3), ignore_index=VOID)
    assert np.isfinite(result.semeda).all()
    assert np.isfinite(result.gradient).all()
    assert report(result)
    if mask.size == 54:  # it takes a second
        draw(result, tmp_path / "p.svg", title="odd")
        assert (tmp_path / "p.svg").stat().st_size > 1000


def test_many_classes_strides_and_large_masks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mask = np.kron(np.arange(40).reshape(5, 8), np.ones((8, 8), np.int64))
    draw(inspect_mask(mask, EdgeProxy(40)), tmp_path / "many.png")
    layers = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    network = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 2, 3, padding=1))
    with pytest.warns(UserWarning, match="reference"):
        pooled: Inspection = inspect_mask(mask[:16, :16] % 3, EdgeProxy.from_sequential(network))
    assert pooled.edge_probability.shape == (16, 16)
    monkeypatch.setattr("semeda_fast.inspection.MAX_ELEMENTS", 40 * 20 * 32)
    cut = inspect_mask(mask, EdgeProxy(40))
    assert cut.cropped_from == (40, 64)
    assert cut.labels.shape == (20, 32)
    assert np.array_equal(cut.labels, mask[10:30, 16:48])
    with pytest.raises(ValueError, match=r"labels from 0 to 39.*3 classes"):
        inspect_mask(mask, EdgeProxy(3))
    with pytest.raises(ValueError, match=r"shape \(0, 4\)"):
        inspect_mask(mask[:0, :4], EdgeProxy(40))


@pytest.mark.skipif(not CAMVID_MASK.exists(), reason="the CamVid masks lie outside the repository and are not here")
def test_inspect_on_a_street_scene(tmp_path: Path) -> None:
    EdgeProxy(11).save(tmp_path / "p.safetensors")
    options = ["--proxy", tmp_path / "p.safetensors", "--ignore-index", 11]
    result = run("inspect", CAMVID_MASK, "--output", tmp_path / "p.png", *options)
    assert result.exit_code == 0, result.output
    assert "class 2 removed" in result.stdout  # the poles
    assert os.path.getsize(tmp_path / "p.png") > 50_000
