"""The fused CPU backend: tensors become addresses for `csrc/cpu`; 2 or 3 bits a feature are kept for backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from .config import FusedConfig, config_text, parse_config
from .distributions import limit_for
from .fused import FusedOps, check_exchanged_labels, name_bad_labels, why_not_taken
from .memory import INPUTS, check_unchanged, facts_of
from .native import native_info, native_module, span
from .params import add_gradients, fill
from .problem import Inputs, Outputs, Problem, Saved, images

WHOSE = "the fused CPU kernels"
MAX_CLASSES = 1024  # csrc/cpu/api.h
_AGAIN = "install semeda_fast again from source, with CC and CXX naming"
UNIT = 16  # pixels in a word of codes, csrc/cpu/plan.h


def why_unavailable() -> str | None:
    """None where the compiled module is there, else the cause and the remedy."""
    info = native_info()
    return None if info.available else info.reason


def why_slow() -> str | None:
    """None, or what the build left out that this processor has: threads, or its widest vectors."""
    return _missing_vectors() or (_no_openmp() if torch.get_num_threads() > 1 else None)


# As csrc/cpu/kernels_*.cpp and setup.py name them, the best first.
_VECTORS = {
    "avx512": ("AVX-512", ("avx512f", "avx512bw", "avx512vl", "fma", "f16c")),
    "avx2": ("AVX2", ("avx2", "fma", "f16c")),
    "neon": ("NEON", ("neon",)),
}


@functools.cache
def _missing_vectors() -> str | None:
    info = native_info()
    if not info.available:
        return None
    for name, (title, needed) in _VECTORS.items():
        if all(info.cpu.get(flag) for flag in needed):
            if name in info.build["instruction_sets"]:
                return None
            compiler = info.build["compiler"]
            return (
                f"the compiler ({compiler}) made no kernels for {title}, which this processor has; {_AGAIN} a "
                "newer compiler"
            )
    return None


@functools.cache
def _no_openmp() -> str | None:
    info = native_info()
    if not info.available or info.build["openmp"]:
        return None
    return (
        f"it was compiled without OpenMP ({info.build['compiler']}), so it uses one thread, whatever "
        f"torch.set_num_threads says; {_AGAIN} a compiler that has OpenMP (GCC has, Apple's clang has not)"
    )


def why_unsupported(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Looks at metadata only."""
    return why_not_taken(WHOSE, MAX_CLASSES, logits, weights, spec)


def upsamples(logits: Tensor, target: Tensor) -> bool:
    """Whether the kernels scale such logits up themselves: with less to gain, torch does it before.

    Their scratch for the gradient is of the logits' size.
    """
    (h, w), (height, width) = logits.shape[-2:], target.shape[-2:]
    return bool(2 * h <= height and 2 * w <= width)


def code_bytes(channels: Sequence[int], width: int, tap: str, distance: str) -> int:
    """Bytes of codes of one image row; channels are K_1 to K_L."""
    if distance == "l1":
        planes = sum(channels[:-1]) * (3 if tap == "pre" else 2) + 2 * channels[-1]
    else:
        planes = sum(channels[:-1])
    return (width + UNIT - 1) // UNIT * 2 * planes


def saved_floats(channels: Sequence[int], width: int, distance: str) -> int:
    """Floats of one image row that are kept of the differences themselves; l1 needs their signs alone."""
    return 0 if distance == "l1" else (width + UNIT - 1) // UNIT * UNIT * sum(channels)


def _params(problem: Problem) -> tuple[Any, list[Tensor]]:
    """The problem as plain data, and the tensors that must outlive it."""
    module = native_module()
    if module is None:
        raise RuntimeError(f"semeda_fast's CPU kernels were called without them: {native_info().reason}")
    params, keep = fill(module, problem)
    params.threads = torch.get_num_threads()
    return params, keep


def _saved(logits: Tensor, target: Tensor, config: FusedConfig) -> Saved:
    n, h, w = images(logits), *target.shape[-2:]
    channels = config.channels[1:]
    return Saved(
        (n, h, code_bytes(channels, w, config.tap, config.distance)),
        (n, h, saved_floats(channels, w, config.distance)),
        torch.float32,
    )


def _forward(problem: Problem, outputs: Outputs) -> None:
    config = problem.config
    params, keep = _params(problem)
    spans: list[tuple[int, int] | None] = [(tensor.data_ptr(), tensor.nbytes) for tensor in outputs]  # new, all of it
    if outputs.codes.numel():
        params.codes, params.saved_d = spans[5:]
    if config.per_pixel:
        params.ce_map, params.semeda_map = spans[:2]
        spans[:2] = None, None
    bad = native_module().cpu_forward(params, spans[:5])
    del keep
    if bad and config.check_labels:
        name_bad_labels(problem)


def _backward(
    problem: Problem, codes: Tensor, saved_d: Tensor, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor
) -> None:
    params, keep = _params(problem)
    module = native_module()
    add_gradients(module, params, d_ce, d_semeda, d_logits)
    params.codes, params.saved_d = span(codes), span(saved_d)
    bad = module.cpu_backward(params)
    del keep
    if bad and problem.config.check_labels:
        check_exchanged_labels(problem)


_operators = FusedOps("cpu", WHOSE, ("CPU",), _saved, _forward, _backward)
run = _operators.run


class _PreparedCall:
    """`problem.Prepared` by `EagerLoss` of csrc/cpu/eager.h, which writes and reads torch's scalars itself."""

    def __init__(self, inputs: Inputs, proxy: Sequence[Tensor], config_of_call: str, spec: LossSpec) -> None:
        module = native_module()
        config = parse_config(config_of_call)
        logits = inputs.logits
        flat = logits.new_empty(0, dtype=torch.float32)
        params, _ = fill(module, Problem(*inputs, flat, config))
        weighted = inputs.class_weight is not None and not inputs.target.is_floating_point()
        self._native = module.EagerLoss(
            params,
            [span(tensor) for tensor in proxy],
            mean=spec.reduction == "mean",
            weighted=weighted,
            nan_if_empty=spec.empty == "nan",
        )
        self._kept_bytes: int = self._native.kept_bytes
        self._saved = _saved(logits, inputs.target, config)
        self._config = config_of_call
        self._check_labels = config.check_labels
        self._like_loss = logits.new_empty((), dtype=torch.float32, requires_grad=False)
        of_kept = torch.Size([self._kept_bytes])
        self._layouts = [*_layouts(inputs), (torch.uint8, (1,), of_kept)]
        self._facts = [*facts_of(inputs), (of_kept, torch.uint8, logits.device)]

    def forward(
        self, inputs: Inputs, lambda_ce: float, lambda_semeda: float, save: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        loss = torch.empty_like(self._like_loss)  # half the time of `new_empty` with a dtype
        kept = inputs.logits.new_empty(self._kept_bytes, dtype=torch.uint8) if save else None
        places = _places(inputs)
        places.append(None if kept is None else (kept.data_ptr(), 0, self._kept_bytes))
        result = self._native.forward(
            places, lambda_ce, lambda_semeda, (loss.data_ptr(), loss.nbytes), torch.get_num_threads()
        )
        if self._check_labels and result.bad_labels:
            name_bad_labels(Problem(*inputs, loss, parse_config(self._config)))
        return loss, kept, (result, places)

    def backward(self, inputs: Inputs, kept: Tensor, record: Any, d_loss: Tensor) -> Tensor:
        result, places_before = record
        places = _places((*inputs, kept))
        # Elsewhere: a hook has packed what was saved, and unpacked something else; or `tensor.data = other`.
        if places != places_before and _layouts((*inputs, kept)) != self._layouts:
            return self.watched_backward(inputs, kept, record, d_loss)
        d_logits = torch.empty_like(inputs.logits)
        try:
            bad = self._native.backward(
                places,
                result,
                span(d_loss),
                (d_logits.data_ptr(), 0, d_logits.nbytes),
                d_logits.stride(),
                torch.get_num_threads(),
            )
        except ValueError:
            self._check_unchanged(inputs, kept)
            raise
        if bad and self._check_labels:
            check_exchanged_labels(Problem(*inputs, kept, parse_config(self._config)))
        return d_logits

    def watched_backward(self, inputs: Inputs, kept: Tensor, record: Any, d_loss: Tensor) -> Tensor:
        self._check_unchanged(inputs, kept)
        d_ce, d_semeda = (d_loss * factor for factor in self._native.seeds(record[0], 1.0))
        saved_d_at, parameters_at = self._native.saved_d_at, self._native.parameters_at

        def part(begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return kept[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

        codes = part(0, self._saved.codes, torch.uint8)
        saved_d = part(saved_d_at, self._saved.saved_d, self._saved.dtype)
        flat = kept[parameters_at:].view(torch.float32)
        return _operators.gradient(d_ce, d_semeda, *inputs, flat, codes, saved_d, config=self._config)

    def _check_unchanged(self, inputs: Inputs, kept: Tensor) -> None:
        check_unchanged((*INPUTS, "what forward kept"), self._facts, (*inputs, kept))


def _layouts(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else (tensor.dtype, tensor.stride(), tensor.shape) for tensor in tensors]


def _places(tensors: Sequence[Tensor | None]) -> list[Any]:
    """`native.place` of each, without the call."""
    return [None if t is None else (t.data_ptr(), t.storage_offset(), t.untyped_storage().nbytes()) for t in tensors]


def prepare(inputs: Inputs, parameters: Sequence[Tensor], spec: LossSpec) -> _PreparedCall | None:
    """What serves calls of this kind without torch around the kernels, or None where tensors need a copy first.

    Args:
        parameters: all of the proxy's weights, then all of its biases.
    """
    weight = inputs.class_weight
    if inputs.target.is_floating_point() and inputs.target.dtype not in _SOFT:
        return None
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in parameters):
        return None
    if weight is not None and not (weight.dtype == torch.float32 and weight.is_contiguous()):
        return None
    weights = parameters[: len(parameters) // 2]
    check = spec.validate == "auto"
    config = config_text(weights, spec, check, limit_for(inputs.target, check))
    return _PreparedCall(inputs, parameters, config, spec)


_SOFT = (torch.float32, torch.bfloat16, torch.float16)
