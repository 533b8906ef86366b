"""examples/train.py does what it promises: it trains, resumes, splits over processes, refuses bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import data  # noqa: E402
import demo  # noqa: E402
import options  # noqa: E402
import runfiles  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402

from semeda_fast import EdgeProxy  # noqa: E402
from semeda_fast.backends import registry as backends  # noqa: E402

STEPS_PER_EPOCH, EPOCHS = 6, 3
TOTAL = STEPS_PER_EPOCH * EPOCHS
VOID = 255


def write_scene(folder: Path, name: str, rng: np.random.Generator) -> None:
    """Two discs on a background with noise, and a band of void of random height."""
    height, width = 32, 40
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), dtype=np.uint8)
    for label in (1, 2):
        radius = rng.integers(5, 11)
        mask[(y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < radius**2] = label
    image = np.stack([np.where(mask == label, 200, 60) for label in range(3)], axis=-1)
    image = (image + rng.integers(0, 50, image.shape)).astype(np.uint8)
    mask[: rng.integers(0, 16)] = VOID
    Image.fromarray(image).save(folder / "images" / f"{name}.png")
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def write_folder(folder: Path, count: int, seed: int) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        write_scene(folder, f"scene{number:02d}", rng)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_folder(root / "train", 4 * STEPS_PER_EPOCH + 1, seed=0)  # one more than fits: it is dropped
    write_folder(root / "val", 5, seed=1)
    EdgeProxy(3, seed=0).save(root / "proxy.safetensors")
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs are compared bit for bit with runs in other processes, which have one thread as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(scenes: Path, output: Path, *more: str, loss: str = "ce+semeda") -> list[str]:
    given = {
        "--images": scenes / "train/images",
        "--masks": scenes / "train/masks",
        "--val-images": scenes / "val/images",
        "--val-masks": scenes / "val/masks",
        "--num-classes": 3,
        "--width": 4,
        "--batch-size": 4,
        "--epochs": EPOCHS,
        "--lr": 3e-3,
        "--log-every": 1,
        "--checkpoint-every": 4,
        "--loss": loss,
        "--proxy": scenes / "proxy.safetensors",
        "--output": output,
    }
    return [str(part) for pair in given.items() for part in pair] + list(more)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, cwd=folder, check=False
    )


@pytest.fixture(autouse=True)
def _fresh_accelerate_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its state per process; a training script is one process's only user."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(output: Path, kind: str | None = None) -> list[dict[str, str]]:
    """The rows of log.csv without the one column that a clock decides."""
    with (output / "log.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if name != "step_time_s"}
        for row in found
        if kind in (None, row["kind"])
    ]


def scores(output: Path) -> dict[str, Any]:
    report = json.loads((output / "report.json").read_text())
    assert report.pop("step_time_median_s") > 0
    return report


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["network"]


def assert_same_run(one: Path, other: Path) -> None:
    """Logs, scores and final weights agree bit for bit."""
    assert rows(one) == rows(other)
    assert scores(one) == scores(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with SEMEDA in this process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main(arguments(scenes, output, "--semeda-ramp", "2")) == 0
    torch.set_num_threads(threads)
    return output


# Training, logs, report


def test_a_run_leaves_logs_report_and_picture(whole_run: Path) -> None:
    steps = rows(whole_run, "train")
    assert [int(row["step"]) for row in steps] == list(range(1, TOTAL + 1))
    assert [int(row["epoch"]) for row in rows(whole_run, "val")] == list(range(EPOCHS))
    losses = [float(row["loss"]) for row in steps]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    for row in steps:
        expected = float(row["ce"]) + float(row["lambda_semeda"]) * float(row["semeda"])
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    ramp = [float(row["lambda_semeda"]) for row in steps]
    full = ramp[-1]
    assert ramp[:12] == pytest.approx([full * step / 12 for step in range(1, 13)])
    assert ramp[12:] == pytest.approx([full] * (TOTAL - 12))
    rates = [float(row["lr"]) for row in steps]
    assert rates == pytest.approx([3e-3 * (1 - step / TOTAL) ** 0.9 for step in range(TOTAL)])

    report = scores(whole_run)
    last = rows(whole_run, "val")[-1]
    for name in ("miou", "boundary_iou", "boundary_f"):
        assert report[name] == float(last[name])
        assert 0 < report[name] < 1
    assert report["miou"] == pytest.approx(np.mean(list(report["class_iou"].values())))
    table = (whole_run / "report.md").read_text()
    assert f"{report['miou']:.4f}" in table
    assert f"{report['boundary_f']:.4f}" in table
    with Image.open(whole_run / "predictions.png") as picture:
        assert min(picture.size) > 400
    assert any((whole_run / "tensorboard").iterdir())


def test_the_saved_predictions_have_the_reported_pixels(scenes: Path, whole_run: Path) -> None:
    """mIoU by hand on the written predictions, which with --pictures 5 would be all; here the four drawn."""
    args = options.parse_args(arguments(scenes, whole_run), "")
    _, val_set = data.make_datasets(args)
    network = unet.build_network("unet", 3, width=4)
    network.load_state_dict(weights(whole_run))
    found = {file.stem: np.asarray(Image.open(file)) for file in (whole_run / "predictions").glob("*.png")}
    assert len(found) == 4
    confusion = np.zeros((3, 3), dtype=np.int64)
    for index, (_, mask_file) in enumerate(val_set.pairs):
        image, target = val_set[(0, index)]
        with torch.no_grad():
            prediction = network.eval()(image[None])[0].argmax(dim=0).numpy()
        if mask_file.stem in found:
            assert np.array_equal(found[mask_file.stem], prediction)
        valid = target.numpy() != VOID
        np.add.at(confusion, (target.numpy()[valid], prediction[valid]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    assert scores(whole_run)["miou"] == pytest.approx((confusion.diagonal() / union).mean(), abs=1e-6)


def test_both_losses_start_from_the_same_seed(scenes: Path, whole_run: Path, tmp_path: Path) -> None:
    assert train.main(arguments(scenes, tmp_path / "ce", loss="ce")) == 0
    plain, semeda = rows(tmp_path / "ce", "train"), rows(whole_run, "train")
    assert float(plain[0]["ce"]) == pytest.approx(float(semeda[0]["ce"]), rel=1e-6)
    assert [row["lr"] for row in plain] == [row["lr"] for row in semeda]
    assert plain[-1]["ce"] != semeda[-1]["ce"]
    assert all(row["ce"] == row["loss"] and float(row["semeda"]) == 0 for row in plain)


def test_the_two_lines_of_semeda_are_marked() -> None:
    text = (EXAMPLES / "train.py").read_text()
    first, second = text.index("--- SEMEDA: line 1 of 2"), text.index("--- SEMEDA: line 2 of 2")
    assert text[first:].splitlines()[1].strip() == "criterion = SemedaLoss("
    assert "compute_loss(logits, target" in text[second:].splitlines()[1]


# Interruption


@pytest.mark.parametrize("last_step", [5, STEPS_PER_EPOCH, 8])
def test_signal_saves_and_resume_gives_the_same_run(
    last_step: int,
    scenes: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped within an epoch, at its end, and at a step that saves anyway."""
    log = runfiles.RunFolder.log

    def log_and_signal(self: runfiles.RunFolder, kind: str, epoch: int, step: int, **values: float) -> None:
        log(self, kind, epoch, step, **values)
        if step == last_step and kind == "train":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runfiles.RunFolder, "log", log_and_signal)
        code = train.main(arguments(scenes, tmp_path / "run", "--semeda-ramp", "2"))
    assert code == 128 + signal.SIGTERM
    assert f"after step {last_step} of {TOTAL}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.json").exists()
    assert train.main(arguments(scenes, tmp_path / "run", "--semeda-ramp", "2", "--resume")) == 0
    assert f"Resuming {tmp_path / 'run'} after step {last_step}" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole_run)


def test_kill_9_and_resume_gives_the_same_run(
    scenes: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "train.py"), *arguments(scenes, output, "--semeda-ramp", "2")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (output / "log.csv").is_file() or f"train,1,{STEPS_PER_EPOCH + 4}," not in (
            output / "log.csv"
        ).read_text(encoding="utf-8"):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    step = saved["epoch"] * STEPS_PER_EPOCH + saved["step_in_epoch"]
    assert 8 <= step < TOTAL  # no more is lost than the steps since the last checkpoint
    with (output / "log.csv").open("a") as file:
        file.write("train,2,17,0.00")  # a row cut off while it was written
    assert train.main(arguments(scenes, output, "--semeda-ramp", "2", "--resume")) == 0
    assert f"after step {step} of {TOTAL}" in capsys.readouterr().out
    assert_same_run(output, whole_run)


def test_resume_of_a_finished_run_reports_again(
    scenes: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, logged = scores(whole_run), rows(whole_run)
    (whole_run / "report.json").unlink()
    assert train.main(arguments(scenes, whole_run, "--semeda-ramp", "2", "--resume")) == 0
    assert scores(whole_run) == before
    assert rows(whole_run) == logged


def test_a_checkpoint_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it writes a checkpoint leaves the one before."""
    run = runfiles.RunFolder(tmp_path / "run", {}, resume=False)
    run.start(0, 0)
    run.save_checkpoint({"step": 1})
    monkeypatch.setattr(torch, "save", lambda state, path: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.save_checkpoint({"step": 2})
    run.close()
    state = runfiles.RunFolder(tmp_path / "run", {}, resume=True).load_checkpoint()
    assert state is not None
    assert state["step"] == 1
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]  # no leftovers


# Several processes


def test_two_processes_give_the_loss_curve_of_one(scenes: Path, whole_run: Path, tmp_path: Path) -> None:
    args = options.parse_args(arguments(scenes, tmp_path), "")
    train_set, _ = data.make_datasets(args)
    batch = next(iter(data.EpochBatches(len(train_set), 4, seed=0)))
    counts = [sum(int((train_set[key][1] != VOID).sum()) for key in half) for half in (batch[:2], batch[2:])]
    assert abs(counts[0] - counts[1]) > 0.05 * sum(counts)  # else a plain mean over processes would pass

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={port}",
    ]
    script = [str(EXAMPLES / "train.py"), *arguments(scenes, tmp_path / "run", "--semeda-ramp", "2")]
    done = call([*launch, *script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    one, two = rows(whole_run, "train"), rows(tmp_path / "run", "train")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for name in ("loss", "ce", "semeda"):
        curve = [float(row[name]) for row in one]
        assert [float(row[name]) for row in two] == pytest.approx(curve, rel=1e-4)
    for name, value in scores(whole_run).items():
        if name in ("miou", "boundary_iou", "boundary_f"):
            assert scores(tmp_path / "run")[name] == pytest.approx(value, abs=0.01)


# Data


def test_samples_depend_on_seed_epoch_and_index_alone(scenes: Path, tmp_path: Path) -> None:
    args = options.parse_args(arguments(scenes, tmp_path, "--crop", "24x48", "--seed", "3"), "")
    train_set, _ = data.make_datasets(args)
    batches = data.EpochBatches(len(train_set), args.batch_size, args.seed)

    def epoch(number: int, step: int, workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches.start_at(number, step)
        return list(data.make_loader(train_set, batches, workers))

    state = torch.get_rng_state()
    plain, workers, later, other = epoch(1, 0, 0), epoch(1, 0, 2), epoch(1, 4, 0), epoch(2, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run draws the dropout of the whole one
    assert len(plain) == STEPS_PER_EPOCH
    for batch, same in [*zip(plain, workers, strict=True), *zip(plain[4:], later, strict=True)]:
        assert torch.equal(batch[0], same[0])
        assert torch.equal(batch[1], same[1])
    assert not torch.equal(plain[0][0], other[0][0])
    images, target = plain[0]
    assert images.shape == (4, 3, 24, 48)
    assert (target[..., 40:] == VOID).all()  # the images are 40 wide: the rest is void
    assert not (target[..., :40] == VOID).all()


def test_held_out_images_are_not_trained_on(scenes: Path, tmp_path: Path) -> None:
    argv = arguments(scenes, tmp_path)
    argv = [part for part in argv if not part.startswith("--val") and "/val/" not in part.replace("\\", "/")]
    train_set, val_set = data.make_datasets(options.parse_args([*argv, "--val-fraction", "0.2"], ""))
    assert len(val_set) == 5
    assert len(train_set) == 20
    assert len({*train_set.pairs, *val_set.pairs}) == 25
    again = data.make_datasets(options.parse_args([*argv, "--val-fraction", "0.2"], ""))
    assert again[1].pairs == val_set.pairs
    few, few_val = data.make_datasets(options.parse_args([*argv, "--limit", "4"], ""))
    assert len(few) == len(few_val) == 4
    assert {*few.pairs} < {*train_set.pairs}


def test_resized_masks_keep_their_labels(scenes: Path, tmp_path: Path) -> None:
    args = options.parse_args(arguments(scenes, tmp_path, "--size", "16x20"), "")
    _, val_set = data.make_datasets(args)
    for index, (_, file) in enumerate(val_set.pairs):
        image, mask = val_set.read(index)
        assert image.shape == (16, 20, 3)
        assert np.array_equal(mask, np.asarray(Image.open(file))[1::2, 1::2])


# Networks


def test_unet_treats_images_one_by_one() -> None:
    network = unet.UNet(5, width=4).train()
    images = torch.rand(3, 3, 21, 13)
    together = network(images)
    assert together.shape == (3, 5, 21, 13)
    assert torch.allclose(together[1:2], network(images[1:2]), atol=1e-5)


def test_a_network_of_transformers_trains(scenes: Path, tmp_path: Path) -> None:
    config = {
        "model_type": "segformer",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    }
    (tmp_path / "small.json").write_text(json.dumps(config))
    more = ("--network", str(tmp_path / "small.json"), "--epochs", "1", "--mixed-precision", "bf16")
    command = [sys.executable, str(EXAMPLES / "train.py"), *arguments(scenes, tmp_path / "run", *more)]
    done = call(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run", "train")) == STEPS_PER_EPOCH
    assert any("segformer" in name for name in weights(tmp_path / "run"))


# Bad input: exit code 2, a message that names the cause and the remedy, no traceback


def copy_of(scenes: Path, to: Path) -> Path:
    write_folder(to / "train", 4 * STEPS_PER_EPOCH + 1, seed=0)
    write_folder(to / "val", 5, seed=1)
    (to / "proxy.safetensors").write_bytes((scenes / "proxy.safetensors").read_bytes())
    return to


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code: Any = train.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert "error: " in error
    return error


def test_wrong_files_are_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy_of(scenes, tmp_path / "scenes")
    output = tmp_path / "run"
    images, masks = broken / "train/images", broken / "train/masks"

    (images / "scene03.png").rename(images / "other.png")
    assert "scene03" in refused(arguments(broken, output), capsys)
    (images / "other.png").rename(images / "scene03.png")

    whole = (masks / "scene00.png").read_bytes()
    (masks / "scene00.png").write_bytes(whole[:60])
    assert "scene00.png" in refused(arguments(broken, output), capsys)
    (masks / "scene00.png").write_bytes(whole)

    Image.fromarray(np.full((32, 40), 7, dtype=np.uint8)).save(masks / "scene01.png")  # not looked at first
    error = refused(arguments(broken, output, "--workers", "1"), capsys)
    assert "scene01.png" in error
    assert "7" in error
    assert len(error.strip().splitlines()) == 1
    assert not multiprocessing.active_children()  # a worker left over, deaf to signals, would keep the process for ever


def test_wrong_folders_and_class_counts(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    missing = str(tmp_path / "nowhere")
    assert "nowhere" in refused(arguments(scenes, output, "--masks", missing), capsys)
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert "empty" in refused(arguments(scenes, output, "--images", empty, "--masks", empty), capsys)
    error = refused(arguments(scenes, output, "--num-classes", "2"), capsys)
    assert ".png" in error
    assert "2" in error
    error = refused(arguments(scenes, output, "--num-classes", "5"), capsys)  # the proxy has 3
    assert "5" in error
    assert "3" in error
    assert not output.exists()


def test_wrong_options(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    error = refused(arguments(scenes, output, "--network", "no-such-network"), capsys)
    assert "no-such-network" in error
    assert "segformer" in error
    assert "--batch-size" in refused(arguments(scenes, output, "--batch-size", "100"), capsys)
    assert "nowhere" in refused(arguments(scenes, output, "--proxy", str(tmp_path / "nowhere")), capsys)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04no proxy")
    error = refused(arguments(scenes, output, "--proxy", str(tmp_path / "bad.safetensors")), capsys)
    assert "bad.safetensors" in error
    assert "--size" in refused(arguments(scenes, output, "--size", "12"), capsys)
    assert "--epochs" in refused(arguments(scenes, output, "--epochs", "0"), capsys)
    names = ("--class-names", "sky,road")
    assert "--class-names" in refused(arguments(scenes, output, *names), capsys)
    alone = arguments(scenes, output)
    at = alone.index("--val-masks")
    assert "--val-masks" in refused(alone[:at] + alone[at + 2 :], capsys)
    assert "fp16" in refused(arguments(scenes, output, "--mixed-precision", "fp16"), capsys)
    missing = dataclasses.replace(backends.get("cpu"), name="missing", why_unavailable=lambda: "nobody built it")
    backends.register(missing)
    try:
        assert "nobody built it" in refused(arguments(scenes, output, "--backend", "missing"), capsys)
    finally:
        backends.unregister("missing")
    assert not output.exists()


def test_outputs_are_not_overwritten_or_mixed(
    scenes: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(whole_run)
    assert "--resume" in refused(arguments(scenes, whole_run, "--semeda-ramp", "2"), capsys)
    error = refused(arguments(scenes, whole_run, "--semeda-ramp", "1", "--resume"), capsys)
    assert "semeda_ramp was 2.0 and is 1.0" in error
    assert rows(whole_run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert "settings.json" in refused(arguments(scenes, tmp_path / "mine", "--resume"), capsys)
    assert "is a file" in refused(arguments(scenes, tmp_path / "mine/thesis.txt"), capsys)
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_broken_checkpoint_is_refused(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    output = tmp_path / "run"
    settings = options.settings(options.parse_args(arguments(scenes, output), ""))
    run = runfiles.RunFolder(output, settings, resume=False)
    run.start(0, 0)
    run.close()
    for content in (Payload(), {"format": "another"}):
        torch.save(content, output / "checkpoint.pt")
        assert "checkpoint.pt" in refused(arguments(scenes, output, "--resume"), capsys)
    assert not (tmp_path / "executed").exists()


# The demo around it


def test_demo_replaces_only_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"

    def prepare(*more: str) -> None:
        demo.prepare_output(demo.parse_args(["--output", str(output), *more]))

    prepare()
    (output / "table.md").write_text("old")
    (output / "ce").mkdir()
    (output / "notes.txt").write_text("mine")
    prepare()
    assert {file.name for file in output.iterdir()} == {demo.MARKER, "notes.txt"}
    inside = ("--images", str(output / "ce"), "--masks", str(output / "ce"), "--num-classes", "2")
    with pytest.raises(data.InputError, match="lies in"):
        prepare(*inside)
    (output / demo.MARKER).unlink()
    with pytest.raises(data.InputError, match="not empty"):
        prepare()
    assert (output / "notes.txt").read_text() == "mine"


def test_demo_window_holds_the_most_edges() -> None:
    mask = np.zeros((20, 30), dtype=np.int64)
    mask[13:17:2, 20:28] = 1
    mask[2, 3] = 1
    mask[:, 29] = VOID  # no edge: void is no label
    rows_, columns = demo.busiest_window(mask, VOID)
    assert (rows_.stop - rows_.start, columns.stop - columns.start) == (8, 12)
    assert rows_.start <= 12
    assert rows_.stop >= 17
    assert columns.start <= 19
    assert columns.stop >= 28
