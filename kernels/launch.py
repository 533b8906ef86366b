"""The launches of forward and backward, in order, as data: the backend runs them, the tests compile and count them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .layers import layer_bwd_kernel, layer_fwd_kernel
from .logits_grad import logits_bwd_kernel
from .plan import MAX_LAYERS, LaunchConfig, Plan, power_of_two
from .reduction import finish_kernel, sum_kernel
from .softmax import softmax_fwd_kernel
from .target import prepare_kernel, tile_class_kernel

DISTANCES = ("l1", "l2", "smooth_l1")  # numbers in layers.py
_TL = {torch.float16: tl.float16, torch.float32: tl.float32}
PACK_BLOCK = 1024


@dataclass(frozen=True)
class Launch:
    """One kernel launch: name -> value of every parameter of the kernel, constexprs included."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch it on the current device and stream."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Inputs:
    """The caller's tensors.

    Attributes:
        logits: [N,C,H,W], or [N,1,H,W] in binary mode; any strides.
        target: [N,H,W] labels, or a float distribution [N,C,H,W].
        valid: [N,H,W] bool, or None.
            Images in groups: [A,B,C,H,W], and A and B in the place of N in target and valid.
        class_weight: [weight_rows, C] fp32, contiguous, or None.
        flat: the proxy's weights, then its biases, fp32 in one tensor.
    """

    logits: Tensor
    target: Tensor
    valid: Tensor | None
    class_weight: Tensor | None
    flat: Tensor

    def label_strides(self) -> dict[str, int]:
        """Of target and valid, as the kernels take them, and how many images are in a group."""
        groups = self.logits.dim() == 5
        t_outer, *t = self.target.stride() if groups else (0, *self.target.stride())
        if len(t) == 3:
            t.insert(1, 0)
        v_outer, *v = (0, 0, 0, 0)
        if self.valid is not None:
            v_outer, *v = self.valid.stride() if groups else (0, *self.valid.stride())
        names = ("t_stride_n", "t_stride_c", "t_stride_h", "t_stride_w", "v_stride_n", "v_stride_h", "v_stride_w")
        fold = self.logits.shape[1] if groups else max(self.logits.shape[0], 1)
        return {**dict(zip(names, (*t, *v), strict=True)), "fold": fold, "t_outer": t_outer, "v_outer": v_outer}


@dataclass
class Prepared:
    """The proxy as the kernels want it: packed weights and biases of each layer, tables of the target's branch."""

    packed: list[Tensor]
    bias: list[Tensor]
    table: list[Tensor | None]
    activated: list[Tensor | None]


def _unit_strides(tensor: Tensor) -> tuple[bool, bool]:
    """Whether neighbouring classes, and neighbouring columns, are adjacent in memory."""
    c, _, w = tensor.stride()[-3:]
    return c == 1, w == 1


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    outer, *strides = tensor.stride() if tensor.dim() == 5 else (0, *tensor.stride())
    named = {f"{prefix}_stride_{axis}": stride for axis, stride in zip("nchw", strides, strict=True)}
    return {f"{prefix}_outer": outer, **named}


def _image(plan: Plan, config: LaunchConfig) -> tuple[dict[str, int], int]:
    """Sizes that every kernel over pixels takes, and its number of programs."""
    across, image, tiles = plan.tiles(config)
    return {"H": plan.h, "W": plan.w, "tiles_x": across, "tiles_per_image": image}, tiles


def prepare(plan: Plan, flat: Tensor, tables: bool) -> tuple[Prepared, list[Launch]]:
    """Packed weights; with `tables`, those of the target's branch, too."""
    result = Prepared([], [], [], [])
    launches = []
    new = flat.new_empty
    weights = [layer.k * layer.c * layer.size**2 for layer in plan.layers]
    biases = flat[sum(weights) :]
    at = 0
    for layer, count in zip(plan.layers, weights, strict=True):
        has_table = tables and layer.number < plan.target_layers
        rows = plan.classes + 1
        packed = new(layer.weights, dtype=plan.dtype)
        bias = new(layer.out_pad)
        table = new((rows, layer.out_pad)) if has_table else None
        activated = new((rows, layer.out_pad), dtype=plan.dtype) if has_table else None
        pack_programs = -(-layer.weights // PACK_BLOCK)
        arguments = {
            "weight": flat[at : at + count],
            "bias": biases[: layer.k],
            "packed": packed,
            "packed_bias": bias,
            "before": result.activated[-1] if has_table and layer.number else None,
            "table": table,
            "activated": activated,
            "pack_programs": pack_programs,
            "C": layer.c,
            "K": layer.k,
            "CLASSES": plan.classes,
            "TAPS": layer.size**2,
            "IN": layer.in_pad,
            "OUT": layer.out_pad,
            "BLOCK": PACK_BLOCK,
            "BLOCK_C": 16,
            "DTYPE": _TL[plan.dtype],
        }
        programs = pack_programs + (-(-rows // 16) if has_table else 0)
        launches.append(Launch(prepare_kernel, programs, arguments))
        at += count
        biases = biases[layer.k :]
        for to, tensor in zip(
            (result.packed, result.bias, result.table, result.activated), (packed, bias, table, activated), strict=True
        ):
            to.append(tensor)  # type: ignore[attr-defined]
    return result, launches


def code_views(plan: Plan, codes: Tensor, saved: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """Codes and kept differences of each layer, as views of the two tensors that backward gets."""
    views: list[tuple[Tensor | None, Tensor | None]] = []
    bits, kept = plan.code_offsets, plan.saved_offsets
    for layer in plan.layers:
        i = layer.number
        size = layer.code_bytes * plan.pixels
        words = codes[bits[i] : bits[i] + size].view(layer.word_dtype) if size and codes.numel() else None
        d = saved[kept[i] : kept[i + 1]] if kept[i + 1] > kept[i] and saved.numel() else None
        views.append((words, d))
    return views


def forward_launches(
    plan: Plan,
    inputs: Inputs,
    outputs: dict[str, Tensor | None],
    precision: str,
) -> Iterator[Launch]:
    """Everything that forward runs; each launch's buffers are made when it is asked for, and freed with it.

    outputs: terms [3 + L] fp32 and counts [2] int64; codes and saved, or None where no gradient will be asked for;
    ce_map and semeda_map [N,H,W] fp32, or None.
    """
    config = plan.config
    new = inputs.logits.new_empty
    prepared, launches = prepare(plan, inputs.flat, tables=not plan.soft)
    yield from launches

    unit_c, unit_w = _unit_strides(inputs.logits)
    softmax = plan.softmax_config(unit_c)
    image, programs = _image(plan, softmax)
    _, tile_programs = _image(plan, plan.tile_config())
    most = max(programs, tile_programs)
    # Rows beyond a kernel's own number of programs stay zero.
    partial = new((4 + len(plan.layers), most), dtype=torch.float32)
    if programs != tile_programs:
        partial.zero_()
    first = plan.layers[0]
    e = new((plan.pixels, first.in_pad), dtype=plan.dtype)
    q = new((plan.pixels, first.in_pad), dtype=plan.dtype) if plan.soft else None
    labels = new(plan.pixels, dtype=plan.label_dtype)
    yield Launch(
        softmax_fwd_kernel,
        programs,
        {
            "logits": inputs.logits,
            "target": inputs.target,
            "valid": inputs.valid,
            "class_weight": inputs.class_weight,
            "e": e,
            "q": q,
            "labels": labels,
            "partial": partial,
            "ce_map": outputs["ce_map"],
            "semeda_map": outputs["semeda_map"],
            **image,
            "tiles": most,
            **_strides("z", inputs.logits),
            **inputs.label_strides(),
            "weight_rows": config.weight_rows,
            "ignore_index": config.ignore_index,
            "label_smoothing": config.label_smoothing,
            "tolerance": config.tolerance,
            "C": plan.classes,
            "IN": first.in_pad,
            "BLOCK_C": plan.block_c,
            "BLOCK_H": softmax.block_h,
            "BLOCK_W": softmax.block_w,
            "BINARY": config.mode == "binary",
            "SOFT": plan.soft,
            "ONE_CHANNEL": plan.soft and inputs.target.shape[-3] == 1 and config.mode == "binary",
            "HAS_SMOOTHING": config.label_smoothing > 0,
            "UNIT_C": unit_c,
            "UNIT_W": unit_w,
            "DTYPE": _TL[plan.dtype],
        },
        softmax.num_warps,
    )
    classes = None
    if not plan.soft and plan.target_layers:
        classes = new((plan.target_layers, tile_programs), dtype=torch.int16)
        yield _tile_classes(plan, labels, classes)
    yield from _layer_launches(plan, prepared, labels, classes, e, q, partial, outputs, precision)

    sums = new(partial.shape[0], dtype=torch.float64)
    yield Launch(sum_kernel, partial.shape[0], {"partial": partial, "sums": sums, "tiles": most, "BLOCK": 2048}, 8)
    weights = {f"w{i}": config.layer_weights[i] if i < len(plan.layers) else 0.0 for i in range(MAX_LAYERS)}
    finish = {"sums": sums, "terms": outputs["terms"], "counts": outputs["counts"], **weights}
    yield Launch(finish_kernel, 1, {**finish, "LAYERS": len(plan.layers)}, 1)


def _tile_classes(plan: Plan, labels: Tensor, classes: Tensor) -> Launch:
    pads = tuple(layer.size // 2 for layer in plan.layers[: plan.target_layers])
    image, programs = _image(plan, plan.tile_config())
    arguments = {
        "labels": labels,
        "classes": classes,
        **image,
        "tiles": programs,
        "REACH": sum(pads),
        "PADS": pads,
        "BLOCK_H": plan.tile[0],
        "BLOCK_W": plan.tile[1],
        "SIDE_H": power_of_two(plan.tile[0] + 2 * sum(pads), 1),
        "SIDE_W": power_of_two(plan.tile[1] + 2 * sum(pads), 1),
    }
    return Launch(tile_class_kernel, programs, arguments, 1)


def _layer_launches(
    plan: Plan,
    prepared: Prepared,
    labels: Tensor,
    classes: Tensor | None,
    x: Tensor,
    xq: Tensor | None,
    partial: Tensor,
    outputs: dict[str, Tensor | None],
    precision: str,
) -> Iterator[Launch]:
    config = plan.config
    codes, saved = outputs["codes"], outputs["saved"]
    save = codes is not None and saved is not None
    views = code_views(plan, codes, saved) if codes is not None and saved is not None else []
    for layer in plan.layers:
        i = layer.number
        launch = plan.layer_config(layer)
        image, programs = _image(plan, launch)
        b = None if layer.last else x.new_empty((plan.pixels, layer.out_pad))
        aq = x.new_empty((plan.pixels, layer.out_pad)) if i + 1 < plan.target_layers else None
        has_target = i < plan.target_layers
        has_classes = has_target and classes is not None
        yield Launch(
            layer_fwd_kernel,
            programs,
            {
                "x_in": x,
                "xq": xq if has_target else None,
                "labels": labels,
                "prev_classes": classes[i - 1] if has_classes and i and classes is not None else None,
                "classes": classes[i] if has_classes and classes is not None else None,
                "prev_activated": prepared.activated[i - 1] if has_classes and i else None,
                "table": prepared.table[i],
                "packed": prepared.packed[i],
                "bias": prepared.bias[i],
                "b": b,
                "aq": aq,
                "codes": views[i][0] if save else None,
                "saved": views[i][1] if save else None,
                "partial": partial[4 + i],
                "semeda_map": outputs["semeda_map"],
                **image,
                "P": plan.pixels,
                "inverse": layer.inverse,
                "coefficient": layer.coefficient,
                "C": plan.classes,
                "K": layer.k,
                "IN": layer.in_pad,
                "OUT": layer.out_pad,
                "BLOCK_K": layer.block_k,
                "BLOCK_H": launch.block_h,
                "BLOCK_W": launch.block_w,
                "KSIZE": layer.size,
                "FROM_LABELS": i == 0 and not plan.soft,
                "LAST": layer.last,
                "POST": config.tap == "post",
                "DISTANCE": DISTANCES.index(config.distance),
                "SAVE": save,
                "DTYPE": _TL[plan.dtype],
                "PRECISION": precision,
            },
            launch.num_warps,
            launch.num_stages,
        )
        if b is not None:
            x, xq = b, aq


def backward_launches(
    plan: Plan,
    inputs: Inputs,
    codes: Tensor,
    saved: Tensor,
    d_ce: Tensor,
    d_semeda: Tensor,
    d_logits: Tensor,
    precision: str,
) -> Iterator[Launch]:
    """Everything that backward runs; d_ce and d_semeda are [1], or [N,H,W] with reduction "none", fp32."""
    config = plan.config
    prepared, launches = prepare(plan, inputs.flat, tables=False)
    yield from launches
    views = code_views(plan, codes, saved)
    maps = config.per_pixel
    distance = DISTANCES.index(config.distance)
    d_t: Tensor | None = None
    for layer in reversed(plan.layers[1:]):
        before = plan.layers[layer.number - 1]
        launch = plan.layer_bwd_config(layer)
        image, programs = _image(plan, launch)
        d_prev = inputs.flat.new_empty((plan.pixels, before.out_pad), dtype=plan.dtype)
        yield Launch(
            layer_bwd_kernel,
            programs,
            {
                "d_t": d_t,
                "codes": views[layer.number][0],
                "saved": views[layer.number][1],
                "prev_codes": views[before.number][0],
                "prev_saved": views[before.number][1],
                "upstream": d_semeda if maps else None,
                "packed": prepared.packed[layer.number],
                "d_prev": d_prev,
                **image,
                "P": plan.pixels,
                "seed_coefficient": layer.coefficient / plan.unit,
                "prev_coefficient": before.coefficient / plan.unit,
                "K": layer.k,
                "PREV_K": before.k,
                "IN": layer.in_pad,
                "OUT": layer.out_pad,
                "BLOCK_H": launch.block_h,
                "BLOCK_W": launch.block_w,
                "KSIZE": layer.size,
                "POST": config.tap == "post",
                "DISTANCE": distance,
                "DTYPE": _TL[plan.dtype],
                "PRECISION": precision,
            },
            launch.num_warps,
            launch.num_stages,
        )
        d_t = d_prev
    launch = plan.logits_grad_config()
    image, programs = _image(plan, launch)
    first = plan.layers[0]
    unit_c, unit_w = _unit_strides(inputs.logits)
    g_unit_c, g_unit_w = _unit_strides(d_logits)
    yield Launch(
        logits_bwd_kernel,
        programs,
        {
            "logits": inputs.logits,
            "target": inputs.target,
            "valid": inputs.valid,
            "class_weight": inputs.class_weight,
            "d_t": d_t,
            "packed": prepared.packed[0],
            "d_ce": d_ce,
            "d_semeda": d_semeda,
            "d_logits": d_logits,
            **image,
            "P": plan.pixels,
            "unit": plan.unit,
            **_strides("z", inputs.logits),
            **_strides("g", d_logits),
            **inputs.label_strides(),
            "weight_rows": config.weight_rows,
            "ignore_index": config.ignore_index,
            "label_smoothing": config.label_smoothing,
            "C": plan.classes,
            "IN": first.in_pad,
            "OUT": first.out_pad,
            "BLOCK_C": plan.block_c,
            "BLOCK_H": launch.block_h,
            "BLOCK_W": launch.block_w,
            "KSIZE": first.size,
            "BINARY": config.mode == "binary",
            "SOFT": plan.soft,
            "ONE_CHANNEL": plan.soft and inputs.target.shape[-3] == 1 and config.mode == "binary",
            "MAPS": maps,
            "UNIT_C": unit_c,
            "UNIT_W": unit_w,
            "G_UNIT_C": g_unit_c,
            "G_UNIT_W": g_unit_w,
            "DTYPE": _TL[plan.dtype],
            "PRECISION": precision,
        },
        launch.num_warps,
        launch.num_stages,
    )


def run_all(launches: Iterator[Launch] | Sequence[Launch]) -> None:
    """Run launches in order on the current device and stream."""
    for launch in launches:
        launch.run()
