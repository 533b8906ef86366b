"""train_proxy: an edge detector trained on ground-truth masks only, then frozen.

After Chen, Dapogny, Cord (2020): the network sees a perturbed one-hot map of a mask and predicts which pixels
lie at a semantic edge. One process, several, and many nodes run the same code (processes.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import defaults
from ..errors import ProxyWarning, missing_extra
from ..plain import void_label, whole_number
from ..warn import warn_user
from .crops import VOID, Crops, check_edges, describe, read_all, split
from .edges import edge_labels
from .network import EdgeProxy
from .processes import Processes, joined, trained_in_fp32
from .quality import edge_quality, measure_scales

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTO_PEAK = 0.9
USEFUL_F1 = 0.5  # below it a proxy draws a warning; random weights stay below, and a short training passes it


def train_proxy(
    masks: Tensor | str | os.PathLike[str] | Dataset[Any],
    num_classes: int,
    *,
    ignore_index: int | None = defaults.IGNORE_INDEX,
    val_masks: Tensor | str | os.PathLike[str] | Dataset[Any] | None = None,
    val_fraction: float = defaults.VAL_FRACTION,
    widths: Sequence[int] = defaults.WIDTHS,
    kernel_size: int = 3,
    tap: str = defaults.TAP,
    distance: str = defaults.DISTANCE,
    layer_weights: Sequence[float] | None = None,
    radius: int = defaults.RADIUS,
    void: str = defaults.VOID,
    noise: float = defaults.NOISE,
    temperature: float | str = defaults.TEMPERATURE,
    steps: int = defaults.STEPS,
    batch_size: int = defaults.BATCH_SIZE,
    crop_size: int = defaults.CROP_SIZE,
    lr: float = defaults.LR,
    seed: int = defaults.SEED,
    progress: bool = True,
    columns: int | None = None,
    accelerator: Accelerator | None = None,
) -> EdgeProxy:
    """Train an EdgeProxy on masks, measure it on held-out ones, and return it.

    The network's input is softmax((onehot + noise * N(0, 1)) / temperature): the perturbation of public
    SEMEDA implementations, with a temperature, since for many classes softmax(onehot) is nearly uniform
    (its peak is e / (e + C - 1): 0.12 for 21 classes), while the loss feeds true one-hot maps.

    Args:
        masks: [M,H,W] integer labels, the path of a folder of mask files, or a Dataset of [H,W] masks.
        num_classes: C; labels are 0..C-1 or ignore_index.
        ignore_index: the void label; None means -100, which is no label.
        val_masks: held-out masks; default: `val_fraction` of `masks`, drawn by `seed`.
        widths, kernel_size, tap, distance, layer_weights: of the EdgeProxy.
        radius: of the edge labels, in pixels.
        void: "mask" feeds void pixels as the zero vector, as the loss does, and leaves them out of training;
            "nearest" fills them with the nearest label of their crop (needs scipy).
        noise: standard deviation of the noise on the one-hot map.
        temperature: of the softmax, or "auto": the one at which a pixel without noise has probability 0.9.
        steps, batch_size, crop_size, lr: of the training; batch_size counts all processes together, crop_size
            is in pixels. Adam, one-cycle learning rate with peak `lr`.
        seed: two runs with the same seed on the same machine give the same proxy.
        progress: show a progress bar.
        columns: train a universal proxy: its first layer gets this many class columns, and each step deals the
            masks' classes to random ones, so that any of them can stand for any class. The result has
            `columns` classes (cut it with `slice_classes`), and val_masks may use all of them.
        accelerator: an accelerate.Accelerator whose device and processes are used; else those that a launcher started,
            or this process and its GPU. Nothing else of Accelerate counts: the training is in fp32 whatever its mixed
            precision is, and an Accelerator that the caller makes before or after is not touched.

    Returns:
        an EdgeProxy on the CPU, with `scales`, `quality` (edge F1, precision and recall on the held-out
        masks, clean input) and `provenance` (all of the above) filled in.

    Raises:
        ValueError, TypeError: options out of range, masks without edges, labels out of range; before the training.
        MaskFileError, FileNotFoundError: a folder or a file in it cannot be used.
        MissingExtraError: accelerate or tqdm (or Pillow, for a folder) is not installed.

    Warns:
        ProxyWarning: the masks that judge hold no edge, or the edge F1 is below 0.5; what to do.
    """
    try:
        import accelerate  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise missing_extra("train_proxy", error.name or "accelerate", "train") from error
    num_classes, ignore_index = whole_number("num_classes", num_classes), void_label(ignore_index)
    if num_classes < 2:
        raise ValueError(f"a proxy tells classes apart: num_classes must be at least 2, got {num_classes}")
    if void not in ("mask", "nearest"):
        raise ValueError(f"void must be 'mask' or 'nearest', got {void!r}")
    steps, batch_size, crop_size, radius, seed = (
        whole_number(name, value)
        for name, value in (
            ("steps", steps), ("batch_size", batch_size), ("crop_size", crop_size), ("radius", radius), ("seed", seed),
        )
    )  # fmt: skip
    for name, value in (("steps", steps), ("batch_size", batch_size), ("crop_size", crop_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= noise < math.inf or not lr > 0:
        raise ValueError(f"noise must be >= 0 and lr > 0, got {noise} and {lr}")
    columns = None if columns is None else whole_number("columns", columns)
    if columns is not None and columns < num_classes:
        raise ValueError(f"columns must be at least num_classes={num_classes}, got {columns}")
    heat = resolve_temperature(temperature, num_classes)
    all_classes = columns or num_classes

    train, val, held_out = split(masks, val_masks, num_classes, all_classes, ignore_index, val_fraction, seed)
    proxy = EdgeProxy(
        all_classes,
        widths,
        kernel_size=kernel_size,
        tap=tap,
        distance=distance,
        layer_weights=layer_weights,
        seed=seed,
    )
    recipe = _Recipe(num_classes, columns, radius, noise, heat, steps, batch_size, lr, seed)
    with joined(accelerator) as processes, trained_in_fp32(processes.device):
        if batch_size % processes.count:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {processes.count} processes it is dealt to"
            )
        crops = Crops(train, steps * batch_size, crop_size, seed, fill_void=void == "nearest")
        # What would be found out last is looked at before the training: bad masks among the held-out ones, too.
        measurable = read_all(val, radius)
        check_edges(crops, train, radius)
        judges = "held-out masks" if held_out else "training masks (none was held out)"
        if not measurable and processes.is_main:
            warn_user(
                f"the {judges} hold no edge, so the proxy's edge F1 will be 0 whatever it learns; give val_masks with "
                "edges, or another seed or val_fraction",
                ProxyWarning,
            )
        started = time.perf_counter()
        network = _fit(_Network(proxy), crops, recipe, processes, progress)
        trained = _frozen(proxy, network)
        quality: dict[str, Any] = edge_quality(trained, val, radius=radius, ignore_index=VOID)
        if measurable and quality["edge_f1"] < USEFUL_F1 and processes.is_main:
            remedies = [
                *([f"train longer (steps is {steps})"] if steps < defaults.STEPS else []),
                *([f"leave temperature at 'auto' (it is {temperature})"] if temperature != "auto" else []),
                *([f"take less noise (it is {noise})"] if noise > defaults.NOISE else []),
                f"try another lr (it is {lr})",
            ]
            warn_user(
                f"the proxy finds the edges of the {judges} with an F1 of {quality['edge_f1']:.4f} only (1 is best), "
                f"so the loss would compare features that know little of edges; {', '.join(remedies)}, or look with "
                "`semeda-fast inspect` at what it sees",
                ProxyWarning,
            )
        return trained.annotated(
            scales=measure_scales(trained, val, ignore_index=VOID),
            quality={**quality, "held_out": held_out},
            provenance={
                "trained": True,
                "masks": describe(masks),
                "val_masks": f"{val_fraction} of masks" if val_masks is None else describe(val_masks),
                "columns": columns,
                "mask_count": len(train),  # type: ignore[arg-type]
                "edge_radius": radius,
                "void": void,
                "noise": noise,
                "temperature": heat,
                "steps": steps,
                "batch_size": batch_size,
                "crop_size": crop_size,
                "lr": lr,
                "seed": seed,
                "seconds": round(time.perf_counter() - started, 1),
                "torch": torch.__version__,
            },
        )


@dataclass(frozen=True)
class _Recipe:
    """How a network is trained; the names are those of train_proxy."""

    num_classes: int
    columns: int | None
    radius: int
    noise: float
    temperature: float
    steps: int
    batch_size: int
    lr: float
    seed: int


def _fit(network: _Network, crops: Crops, recipe: _Recipe, processes: Processes, progress: bool) -> _Network:
    """Train the network on its device: each process takes its part of each batch, and all step alike."""
    from tqdm.auto import tqdm

    network = network.to(processes.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    share = recipe.batch_size // processes.count
    mine = [
        step * recipe.batch_size + processes.number * share + number
        for step in range(recipe.steps)
        for number in range(share)
    ]
    # A generator of its own: without one, a DataLoader draws a seed from the global random state.
    loader = DataLoader(crops, share, sampler=mine, generator=torch.Generator())
    generator = torch.Generator(processes.device).manual_seed(recipe.seed * 1_000_003 + processes.number)
    dealer = torch.Generator().manual_seed(recipe.seed)  # deals the same columns in every process
    bar = tqdm(loader, total=recipe.steps, desc="train proxy", disable=not (progress and processes.is_main))
    for step, crop in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle(step / recipe.steps)
        labels = crop.to(processes.device)
        edges = edge_labels(labels, radius=recipe.radius, ignore_index=VOID)
        probs = perturbed(labels, recipe.num_classes, recipe.noise, recipe.temperature, generator)
        dealt = None
        if recipe.columns is not None:
            dealt = torch.randperm(recipe.columns, generator=dealer)[: recipe.num_classes].to(processes.device)
        loss = F.cross_entropy(
            network(probs, dealt), torch.where(labels == VOID, VOID, edges.long()), ignore_index=VOID
        )
        optimizer.zero_grad()
        loss.backward()
        processes.average(network.parameters())
        optimizer.step()
        if step % 20 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return network


def resolve_temperature(temperature: float | str, num_classes: int) -> float:
    """The temperature as a number: "auto" makes softmax(onehot / T) peak at AUTO_PEAK.

    e^(1/T) / (e^(1/T) + C - 1) = peak  =>  T = 1 / ln(peak / (1 - peak) * (C - 1)).
    """
    if isinstance(temperature, str):
        if temperature != "auto":
            raise ValueError(f"temperature must be a positive number or 'auto', got {temperature!r}")
        return 1.0 / math.log(AUTO_PEAK / (1 - AUTO_PEAK) * (num_classes - 1))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number or 'auto', got {temperature}")
    return float(temperature)


def perturbed(labels: Tensor, num_classes: int, noise: float, temperature: float, generator: torch.Generator) -> Tensor:
    """softmax((onehot + noise * N(0, 1)) / temperature) of labels [N,H,W], zero at void: [N,C,H,W] fp32."""
    n, h, w = labels.shape
    valid = labels != VOID
    x = torch.empty((n, num_classes, h, w), dtype=torch.float32, device=labels.device).normal_(
        0.0, noise, generator=generator
    )
    x.scatter_add_(1, torch.where(valid, labels, 0).unsqueeze(1), torch.ones_like(x[:, :1]))
    # In place: with 256 classes each copy of x costs as much as the network's own pass.
    return torch.softmax(x.div_(temperature), dim=1).mul_(valid.unsqueeze(1))


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate: up over the first tenth, then down to 0 by a cosine."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


class _Network(nn.Module):
    """The proxy's network with parameters instead of buffers, the same initial values."""

    def __init__(self, proxy: EdgeProxy) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight.clone() for weight in proxy.weights)
        self.biases = nn.ParameterList(bias.clone() for bias in proxy.biases)

    def forward(self, probs: Tensor, columns: Tensor | None) -> Tensor:
        """Edge logits of probs [N,C,H,W], whose class c goes to column columns[c] (to column c for None)."""
        x = probs
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number > 0:
                x = F.conv2d(torch.relu(x), weight, bias, padding="same")
            else:
                x = F.conv2d(x, weight if columns is None else weight[:, columns], bias, padding="same")
        return x


def _frozen(proxy: EdgeProxy, network: _Network) -> EdgeProxy:
    """`proxy` with the weights of its trained network."""
    return EdgeProxy.from_tensors(
        proxy.layers,
        [weight.detach().cpu() for weight in network.weights],
        [bias.detach().cpu() for bias in network.biases],
        tap=proxy.tap,
        distance=proxy.distance,
        layer_weights=proxy.layer_weights,
    )
