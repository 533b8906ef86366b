"""train_proxy: an edge detector trained on ground-truth masks only, then frozen.

After Chen, Dapogny, Cord (2020): the network sees a perturbed one-hot map of a mask and predicts which pixels
lie at a semantic edge. One process, several, and many nodes run the same code through Accelerate.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..advice import FILES, ITEMS, MASKS, advice_on, lost_foreground
from ..errors import missing_extra
from ..reference import not_ignored
from ..shapes import many_masks, one_mask
from .edges import edge_labels
from .masks import MaskFolder, describe_folder
from .network import EdgeProxy
from .quality import edge_quality, measure_scales

if TYPE_CHECKING:
    from accelerate import Accelerator

VOID = -1  # the void label inside this module, whatever the caller's ignore_index is
AUTO_PEAK = 0.9
_CACHE_BYTES = 512 * 2**20


def train_proxy(
    masks: Tensor | str | os.PathLike[str] | Dataset[Any],
    num_classes: int,
    *,
    ignore_index: int = -100,
    val_masks: Tensor | str | os.PathLike[str] | Dataset[Any] | None = None,
    val_fraction: float = 0.1,
    widths: Sequence[int] = (16, 32),
    kernel_size: int = 3,
    tap: str = "pre",
    distance: str = "l1",
    layer_weights: Sequence[float] | None = None,
    radius: int = 1,
    void: str = "mask",
    noise: float = 0.1,
    temperature: float | str = "auto",
    steps: int = 1200,
    batch_size: int = 16,
    crop_size: int = 48,
    lr: float = 1e-2,
    seed: int = 0,
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
        accelerator: an accelerate.Accelerator to use in place of a new one.

    Returns:
        an EdgeProxy on the CPU, with `scales`, `quality` (edge F1, precision and recall on the held-out
        masks, clean input) and `provenance` (all of the above) filled in.

    Raises:
        ValueError, TypeError: options out of range, masks without edges, labels out of range.
        MaskFileError, FileNotFoundError: a folder or a file in it cannot be used.
        MissingExtraError: accelerate or tqdm (or Pillow, for a folder) is not installed.
    """
    try:
        import accelerate  # noqa: F401
        from tqdm.auto import tqdm
    except ImportError as error:
        raise missing_extra("train_proxy", error.name or "accelerate", "train") from error
    if num_classes < 2:
        raise ValueError(f"a proxy tells classes apart: num_classes must be at least 2, got {num_classes}")
    if void not in ("mask", "nearest"):
        raise ValueError(f"void must be 'mask' or 'nearest', got {void!r}")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("crop_size", crop_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= noise < math.inf or not lr > 0:
        raise ValueError(f"noise must be >= 0 and lr > 0, got {noise} and {lr}")
    if columns is not None and columns < num_classes:
        raise ValueError(f"columns must be at least num_classes={num_classes}, got {columns}")
    heat = resolve_temperature(temperature, num_classes)
    all_classes = columns or num_classes

    train, val, held_out = _split(masks, val_masks, num_classes, all_classes, ignore_index, val_fraction, seed)
    proxy = EdgeProxy(
        all_classes,
        widths,
        kernel_size=kernel_size,
        tap=tap,
        distance=distance,
        layer_weights=layer_weights,
        seed=seed,
    )
    accelerator = accelerator or _new_accelerator()
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {accelerator.num_processes} processes it is dealt to"
        )
    crops = _Crops(train, steps * batch_size, crop_size, seed, fill_void=void == "nearest")
    split = getattr(accelerator, "split_batches", False)
    per_loader = batch_size if split else batch_size // accelerator.num_processes
    network: nn.Module = _Network(proxy)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    # A generator of its own: without one, a DataLoader draws a seed from the global random state.
    loader = DataLoader(crops, per_loader, generator=torch.Generator())
    # What prepare() registers would end up in the caller's save_state(), so it is taken out again.
    registries = (accelerator._models, accelerator._optimizers, accelerator._dataloaders)
    counts = [len(registry) for registry in registries]
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for registry, count in zip(registries, counts, strict=True):
        del registry[count:]
    generator = torch.Generator(accelerator.device).manual_seed(seed * 1_000_003 + accelerator.process_index)
    dealer = torch.Generator().manual_seed(seed)  # deals the same columns in every process

    for index in range(len(val)):  # type: ignore[arg-type]
        val[index]  # they are judged by last: a bad one is to be found before the training
    started = time.perf_counter()
    edge_pixels = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    bar = tqdm(loader, total=steps, desc="train proxy", disable=not (progress and accelerator.is_main_process))
    for step, labels in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lr * one_cycle(step / steps)
        edges = edge_labels(labels, radius=radius, ignore_index=VOID)
        edge_pixels += edges.sum()
        probs = perturbed(labels, num_classes, noise, heat, generator)
        dealt = None if columns is None else torch.randperm(columns, generator=dealer)[:num_classes].to(probs.device)
        loss = F.cross_entropy(
            network(probs, dealt), torch.where(labels == VOID, VOID, edges.long()), ignore_index=VOID
        )
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % 20 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    if int(accelerator.reduce(edge_pixels)) == 0:
        place = FILES if isinstance(masks, (str, os.PathLike)) else MASKS if isinstance(masks, Tensor) else ITEMS
        raise ValueError(
            "the masks hold no edge: no crop has two classes side by side; check num_classes and masks"
            f"{lost_foreground(ignore_index, place)}"
        )

    trained = _frozen(proxy, cast(_Network, accelerator.unwrap_model(network)))
    quality = edge_quality(trained, val, radius=radius, ignore_index=VOID)
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
    x = torch.empty((n, num_classes, h, w), device=labels.device).normal_(0.0, noise, generator=generator)
    x.scatter_add_(1, torch.where(valid, labels, 0).unsqueeze(1), torch.ones_like(x[:, :1]))
    # In place: with 256 classes each copy of x costs as much as the network's own pass.
    return torch.softmax(x.div_(temperature), dim=1).mul_(valid.unsqueeze(1))


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate: up over the first tenth, then down to 0 by a cosine."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def describe(masks: object) -> str:
    """What the masks are, for the provenance; a folder by its last two names, not by its full path."""
    if isinstance(masks, (str, os.PathLike)):
        return describe_folder(masks)
    if isinstance(masks, Tensor):
        return f"tensor {list(masks.shape)}"
    return getattr(masks, "description", type(masks).__name__)


class _Masks(Dataset[Tensor]):
    """Any source of masks as int16 [H,W] with VOID for void; checked, and kept in memory while that is small."""

    def __init__(self, source: Any, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        if isinstance(source, (str, os.PathLike)):
            source = MaskFolder(source, num_classes=num_classes, ignore_index=ignore_index)
        elif isinstance(source, Tensor) and source.dim() != 3:
            remedy = many_masks(source.shape)
            raise ValueError(f"masks as a tensor must have the shape [M,H,W], got {list(source.shape)}; {remedy}")
        elif not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"masks must be a tensor [M,H,W], a folder or a Dataset with a length, got {type(source).__name__}"
            )
        if len(source) == 0:
            raise ValueError("there is no mask to train on: masks is empty")
        self.source = source
        self.cache: dict[int, Tensor] = {}
        self.free = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.cache:
            return self.cache[index]
        item = self.source[index]
        try:
            mask = torch.as_tensor(item)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"mask {index} must be integer labels [H,W], got {type(item).__name__}; "
                "a Dataset of masks gives masks alone, no (image, mask) pairs"
            ) from error
        if mask.dim() != 2 or mask.numel() == 0 or mask.is_floating_point():
            remedy = one_mask(mask, self.ignore_index)
            raise ValueError(
                f"mask {index} must be integer labels [H,W], got {list(mask.shape)}, {mask.dtype}; {remedy}"
            )
        valid = not_ignored(mask, self.ignore_index)
        labels = torch.where(valid, mask.long(), 0)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            place = MASKS if isinstance(self.source, Tensor) else ITEMS
            raise ValueError(
                f"mask {index} holds labels from {int(labels.min())} to {int(labels.max())}, expected 0 to "
                f"{self.num_classes - 1} or ignore_index={self.ignore_index}. "
                f"{advice_on(mask, self.num_classes, self.ignore_index, place)}."
            )
        result = torch.where(valid, labels, VOID).to(torch.int16)
        size = result.numel() * result.element_size()
        if size <= self.free:
            self.free -= size
            self.cache[index] = result
        return result


class _Subset(Dataset[Tensor]):
    """Some masks of a _Masks."""

    def __init__(self, masks: Dataset[Tensor], indices: list[int]) -> None:
        self.masks, self.indices = masks, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.masks[self.indices[index]]


class _Crops(Dataset[Tensor]):
    """Random crops with flips, int64; crop i depends only on (seed, i), whoever asks for it."""

    def __init__(self, masks: Dataset[Tensor], length: int, size: int, seed: int, *, fill_void: bool) -> None:
        self.masks, self.length, self.size, self.seed, self.fill_void = masks, length, size, seed, fill_void

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.length:
            raise IndexError(index)
        # Not a torch.Generator, which drops all but the low 32 bits of a seed such as (seed << 32) + index.
        rng = np.random.default_rng((self.seed & 0xFFFF_FFFF_FFFF_FFFF, index))

        def draw(below: int) -> int:
            return int(rng.integers(below))

        mask = self.masks[draw(len(self.masks))]  # type: ignore[arg-type]
        size = self.size
        top, left = (draw(max(1, extent - size + 1)) for extent in mask.shape)
        crop = mask[top : top + size, left : left + size]
        if self.fill_void:
            crop = _fill_nearest(crop)
        if draw(2):
            crop = crop.flip(1)
        if draw(2):
            crop = crop.flip(0)
        # Masks smaller than a crop are surrounded by void, which the loss shows as zeros, like its padding.
        full = torch.full((size, size), VOID, dtype=torch.int64)
        full[: crop.shape[0], : crop.shape[1]] = crop
        return full


def _fill_nearest(mask: Tensor) -> Tensor:
    """Void pixels take the label of the nearest valid pixel (Euclidean); a mask of void alone stays as it is."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise missing_extra("void='nearest'", "scipy", "train") from error
    void = mask == VOID
    if not bool(void.any()) or bool(void.all()):
        return mask
    rows, columns = distance_transform_edt(void.numpy(), return_distances=False, return_indices=True)
    return mask[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def _split(
    masks: Any,
    val_masks: Any,
    num_classes: int,
    val_classes: int,
    ignore_index: int,
    val_fraction: float,
    seed: int,
) -> tuple[Dataset[Tensor], Dataset[Tensor], bool]:
    """Training masks, validation masks, and whether the latter were held out."""
    train = _Masks(masks, num_classes, ignore_index)
    if val_masks is not None:
        return train, _Masks(val_masks, val_classes, ignore_index), True
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    held = min(len(train) - 1, math.ceil(val_fraction * len(train)))
    if held == 0:
        return train, train, False
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return _Subset(train, sorted(order[held:])), _Subset(train, sorted(order[:held])), True


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


def _new_accelerator() -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    started = int(os.environ.get("WORLD_SIZE", "1"))
    return Accelerator(
        # Without a GPU, Accelerate joins several processes only if it is told that they run on CPUs.
        cpu=started > 1 and not (torch.cuda.is_available() or torch.xpu.is_available()),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
