"""The whole way on a small scale: train a proxy on masks, then a network with and without SEMEDA.

    python examples/demo.py                                       on synthetic scenes
    python examples/demo.py --images DIR --masks DIR --num-classes N --ignore-index N

It writes to demo-output/: the proxy, both runs, table.md, comparison.png and windows.png. The two trainings are plain
calls of examples/train.py, printed before they start. Running it again replaces what it wrote, nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import EpochBatches, InputError, Pairs, make_datasets, make_loader
from options import parse_args as parse_train_args
from PIL import Image
from report import add_legend, paint, palette
from torch import Tensor
from torch.utils.data import Dataset
from unet import build_network

from semeda_fast import SemedaLoss, train_proxy
from semeda_fast.files import atomic_path
from semeda_fast.proxy.edges import edge_labels

HERE = Path(__file__).resolve().parent
MARKER = "made-by-semeda-fast-demo.txt"
MINE = ("scenes", "proxy.safetensors", "ce", "ce+semeda", "table.md", "comparison.png", "windows.png", MARKER)
LOSSES = ("ce", "ce+semeda")
BATCH = 4
AREA = 96 * 128  # pixels per image that fit the time of a demo


class TargetsOf(Dataset[Tensor]):
    """The masks of a data set as int64 [H,W], as they are when training starts on them."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pairs.read(index)[1].astype(np.int64))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    started = time.perf_counter()
    # Networks this small gain little from more threads, and lose much where other programs want the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        prepare_output(args)
        data = data_options(args)
        common = training_options(args, data)
        options = parse_train_args([*common, "--output", str(args.output)], "")
        train_set, val_set = make_datasets(options)
        say(f"1/3  A proxy learns semantic edges from {len(train_set)} masks; no images are used")
        proxy_file = make_proxy(args, train_set, val_set)
        for number, loss in enumerate(LOSSES, start=2):
            say(f"{number}/3  A small U-Net learns with {loss}")
            extra = ["--proxy", str(proxy_file)] if loss != "ce" else []
            command = [str(HERE / "train.py"), *common, "--loss", loss, *extra]
            run([*command, "--output", str(args.output / loss)])
        seconds = measure_steps(train_set, proxy_file, options)
        report(args.output, train_set, val_set, seconds)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: the training ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next demo starts from the beginning.", file=sys.stderr)
        return 130
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at {args.output / 'comparison.png'}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=Path, help="folder of images (default: synthetic scenes)")
    parser.add_argument("--masks", type=Path, help="folder of their masks")
    parser.add_argument("--num-classes", type=int, help="of your masks: labels are 0 .. N-1")
    parser.add_argument("--ignore-index", type=int, default=255, help="label of void pixels (255)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=480, help="training steps of each network (480)")
    parser.add_argument("--proxy-steps", type=int, default=200, help="training steps of the proxy (200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.images is None) != (args.masks is None):
        parser.error("--images and --masks belong together: give both or neither")
    if args.images is not None and args.num_classes is None:
        parser.error("--num-classes is needed with --images and --masks")
    return args


def prepare_output(args: argparse.Namespace) -> None:
    """Make the output folder; if an earlier demo made it, remove what that demo wrote."""
    folder: Path = args.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise InputError(f"--output {folder} is not empty and no demo made it; remove it or choose another folder")
        for source in (args.images, args.masks):
            if source is not None and folder.resolve() in source.resolve().parents:
                raise InputError(f"{source} lies in {folder}, which the demo replaces; choose another --output")
        print(f"Replacing the results of an earlier demo in {folder}")
        for name in MINE:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("The next demo replaces the files of this one.\n", encoding="utf-8")


def data_options(args: argparse.Namespace) -> list[str]:
    """Options of train.py that name the data; without folders given, synthetic scenes are written first."""
    if args.images is not None:
        classes = str(args.num_classes)
        folders = ["--images", str(args.images), "--masks", str(args.masks), "--limit", "400"]
    else:
        from scenes import CLASS_NAMES, IGNORE_INDEX, write_scenes

        scenes = args.output / "scenes"
        write_scenes(scenes, train=96, val=32, size=(96, 128), seed=args.seed)
        args.ignore_index = IGNORE_INDEX
        classes = str(len(CLASS_NAMES))
        folders = ["--images", str(scenes / "train/images"), "--masks", str(scenes / "train/masks")]
        folders += ["--val-images", str(scenes / "val/images"), "--val-masks", str(scenes / "val/masks")]
        folders += ["--class-names", ",".join(CLASS_NAMES)]
    return [*folders, "--num-classes", classes, "--ignore-index", str(args.ignore_index)]


def training_options(args: argparse.Namespace, data: list[str]) -> list[str]:
    """What both trainings share: everything but the loss and the output."""
    options = parse_train_args([*data, "--batch-size", str(BATCH), "--output", str(args.output)], "")
    train_set, _ = make_datasets(options)
    height, width = train_set.read(0)[0].shape[:2]
    scale = min(1.0, (AREA / (height * width)) ** 0.5)
    height, width = max(16, round(height * scale)), max(16, round(width * scale))
    epochs = max(1, round(args.steps / (len(train_set) // BATCH)))
    plan: dict[str, Any] = {"--size": f"{height}x{width}", "--crop": f"{2 * height // 3}x{3 * width // 4}"}
    # The rate is high for AdamW, because the training is short.
    plan |= {"--width": 8, "--batch-size": BATCH, "--epochs": epochs, "--lr": 4e-3, "--seed": args.seed}
    plan |= {"--val-every": -(-epochs // 3), "--log-every": 10, "--pictures": 3}
    return [*data, *(str(part) for pair in plan.items() for part in pair)]


def make_proxy(args: argparse.Namespace, train_set: Pairs, val_set: Pairs) -> Path:
    """Train the proxy on the training masks, test it on the validation masks, save it."""
    proxy = train_proxy(
        TargetsOf(train_set),
        train_set.num_classes,
        ignore_index=train_set.ignore_index,
        val_masks=TargetsOf(val_set),
        steps=args.proxy_steps,
        batch_size=8,
        crop_size=48,
        seed=args.seed,
    )
    file: Path = args.output / "proxy.safetensors"
    proxy.save(file)
    print(f"edge F1 on the {len(val_set)} validation masks: {proxy.quality['edge_f1']:.3f}; saved as {file}")
    return file


def run(command: list[str]) -> None:
    print("$ python " + shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def measure_steps(train_set: Pairs, proxy_file: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a training step with each loss, in turn so that other programs disturb both alike."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network("unet", train_set.num_classes, width=options.width).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    void = train_set.ignore_index
    criteria: dict[str, torch.nn.Module] = {
        "ce": torch.nn.CrossEntropyLoss(ignore_index=void),
        "ce+semeda": SemedaLoss(proxy_file, num_classes=train_set.num_classes, ignore_index=void).to(device),
    }
    batch = next(iter(EpochBatches(len(train_set), options.batch_size, options.seed)))
    images, target = next(iter(make_loader(train_set, [batch], 0)))
    images, target = images.to(device), target.to(device)
    times: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    for _ in range(16):
        for loss in LOSSES:
            begin = time.perf_counter()
            optimizer.zero_grad()
            criteria[loss](network(images), target).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[loss].append(time.perf_counter() - begin)
    return {loss: statistics.median(found[1:]) for loss, found in times.items()}  # the first one warms up


def report(output: Path, train_set: Pairs, val_set: Pairs, seconds: dict[str, float]) -> None:
    """Print and write the table, draw the picture."""
    found = {loss: json.loads((output / loss / "report.json").read_text(encoding="utf-8")) for loss in LOSSES}
    tolerance = found["ce"]["boundary_f_tolerance_px"]
    lines = [
        f"| loss | mIoU | boundary IoU | boundary F ({tolerance:g} px) | step time | loss overhead |",
        "|---|---|---|---|---|---|",
    ]
    for loss, values in found.items():
        scores = " | ".join(_show(values[name]) for name in ("miou", "boundary_iou", "boundary_f"))
        more = seconds[loss] - seconds["ce"]
        overhead = "-" if loss == "ce" else f"{1000 * more:+.1f} ms ({more / seconds['ce']:+.0%})"
        lines.append(f"| {loss} | {scores} | {1000 * seconds[loss]:.1f} ms | {overhead} |")
    table = "\n".join(lines)
    note = (
        f"{len(train_set)} training and {len(val_set)} validation images; same seed and steps, one run of each loss. "
        "Step times are medians of steps taken in turn. Overhead weighs more, the smaller the network. On so small "
        "a task another seed may turn differences of a few hundredths around."
    )
    with atomic_path(output / "table.md", overwrite=True) as path:
        path.write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    say("Result")
    print(f"{table}\n\n{note}")
    draw_windows(output, val_set)
    draw_comparison(output, val_set, list(found["ce"]["class_iou"]))


def draw_comparison(output: Path, val_set: Pairs, class_names: list[str]) -> None:
    """comparison.png: each image in full, and below it the window with the most label edges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(file.stem for file in (output / "ce" / "predictions").glob("*.png"))
    index = {pair[1].stem: number for number, pair in enumerate(val_set.pairs)}
    colours = palette(val_set.num_classes)
    height, width = val_set.read(0)[0].shape[:2]
    size = (12, 6 * len(names) * height / width + 1)
    figure, axes = plt.subplots(2 * len(names), 4, figsize=size, squeeze=False, layout="constrained")
    for row, name in enumerate(names):
        image, mask = val_set.read(index[name])
        valid = mask != val_set.ignore_index
        window = busiest_window(mask, val_set.ignore_index)
        for column, (title, labels) in enumerate(_columns(output, name, mask)):
            full, zoom = axes[2 * row, column], axes[2 * row + 1, column]
            picture = image if labels is None else paint(labels, colours, valid)
            full.imshow(picture)
            zoom.imshow(picture[window], interpolation="nearest")
            top, left = window[0].start, window[1].start
            box = plt.Rectangle(
                (left - 0.5, top - 0.5),
                window[1].stop - left,
                window[0].stop - top,
                fill=False,
                edgecolor="black",
                linewidth=1.5,
            )
            full.add_patch(box)
            if row == 0:
                full.set_title(title)
            if labels is not None and column > 1:
                wrong = valid & (labels != mask)
                _outline(zoom, wrong[window])
                full.set_xlabel(f"wrong: {wrong.sum() / valid.sum():.1%} of all", fontsize=8)
                part = wrong[window].sum() / max(1, valid[window].sum())
                zoom.set_xlabel(f"wrong: {part:.1%} of the window", fontsize=8)
        axes[2 * row, 0].set_ylabel(name, fontsize=8)
        axes[2 * row + 1, 0].set_ylabel("window", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        "Validation images, evenly spaced. Window: where the ground truth has most label edges; "
        "wrong pixels there are outlined.",
        fontsize=9,
    )
    add_legend(figure, set(range(val_set.num_classes)), class_names, colours)
    with atomic_path(output / "comparison.png", overwrite=True) as path:
        figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_windows(output: Path, val_set: Pairs) -> None:
    """windows.png: of each image of the comparison its window alone; the picture of the README."""
    from matplotlib.figure import Figure

    names = sorted(file.stem for file in (output / "ce" / "predictions").glob("*.png"))
    index = {pair[1].stem: number for number, pair in enumerate(val_set.pairs)}
    colours = palette(val_set.num_classes)
    figure = Figure(figsize=(11, 2.25 * len(names)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(names), 4, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        image, mask = val_set.read(index[name])
        valid = mask != val_set.ignore_index
        window = busiest_window(mask, val_set.ignore_index)
        for axis, (_, labels) in zip(row, _columns(output, name, mask), strict=True):
            picture = image if labels is None else paint(labels, colours, valid)
            axis.imshow(picture[window], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if labels is not None and axis is not row[1]:
                wrong = valid & (labels != mask)
                _outline(axis, wrong[window])
                axis.set_xlabel(f"wrong: {wrong[window].sum() / max(1, valid[window].sum()):.0%}")
    for axis, title in zip(axes[0], ("image", "ground truth", "cross-entropy", "cross-entropy + SEMEDA"), strict=True):
        axis.set_title(title)
    with atomic_path(output / "windows.png", overwrite=True) as path:
        figure.savefig(path, dpi=80, format="png")


def busiest_window(mask: np.ndarray, ignore_index: int) -> tuple[slice, slice]:
    """The window, 2/5 of the image high and wide, that holds most edge pixels of the ground truth."""
    height, width = (max(4, extent * 2 // 5) for extent in mask.shape)
    edges = edge_labels(torch.from_numpy(mask.astype(np.int64)), ignore_index=ignore_index)
    counts = torch.nn.functional.avg_pool2d(edges[None, None].float(), (height, width), stride=1)[0, 0]
    top, left = divmod(int(counts.argmax()), counts.shape[1])
    return slice(top, top + height), slice(left, left + width)


def _columns(output: Path, name: str, mask: np.ndarray) -> list[tuple[str, Any]]:
    predictions = [np.asarray(Image.open(output / loss / "predictions" / f"{name}.png")) for loss in LOSSES]
    return [("image", None), ("ground truth", mask), *zip(LOSSES, predictions, strict=True)]


def _outline(axis: Any, wrong: np.ndarray) -> None:
    """Lines between wrong and right pixels, along the pixels' sides."""
    padded = np.pad(wrong, 1)
    rows, columns = np.nonzero(padded[1:] != padded[:-1])
    axis.hlines(rows - 0.5, columns - 1.5, columns - 0.5, color="black", linewidth=0.8)
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    axis.vlines(columns - 0.5, rows - 1.5, rows - 0.5, color="black", linewidth=0.8)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in order with what the trainings print, in a pipe too
    sys.exit(main())
