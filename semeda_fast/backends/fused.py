"""The operators of a fused backend: schema, fake, autograd, dispatch. A backend brings two functions on tensors.

`semeda_fast::<name>_forward` gives the terms and, where a gradient will be wanted, the codes that
`semeda_fast::<name>_backward` turns into it. Both are opaque to the compiler, so one compiled graph holds them as they
are, for any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..capture import asks_gradient, recorded, untraced, watched
from ..spec import LossSpec, LossTerms
from . import flops
from .config import FusedConfig, config_text, parse_config
from .distributions import bad_pixels, limit_for, raise_bad_distribution
from .memory import INPUTS, REMEDY, check_consistent, check_kept, check_unchanged, check_upstream, facts_of
from .problem import Outputs, Problem, Saved, images
from .reference import validity
from .values import assertion, check_labels

MAX_FUSED_LAYERS = 8
MAX_FUSED_CHANNELS = 64

ForwardFunction = Callable[[Problem, Outputs], None]  # fills all of Outputs
BackwardFunction = Callable[[Problem, Tensor, Tensor, Tensor, Tensor, Tensor], None]  # codes ... d_logits, filled
SavedFunction = Callable[[Tensor, Tensor, FusedConfig], Saved]


def assert_labels(problem: Problem, bad: Tensor) -> None:
    """Object to a target with labels that are no class, or with soft values that are no distribution.

    An asynchronous assert, or on the CPU the error of the checks at once.

    Args:
        bad: [] int64, how many pixels a kernel has found, on the logits' device.

    Raises:
        ValueError: on the CPU; the text names what they hold.
    """
    if bad.device.type == "cpu":
        if int(bad):
            name_bad_labels(problem)
        return
    torch._assert_async(bad == 0, assertion(problem.target))


def name_bad_labels(problem: Problem) -> None:
    """Raise the ValueError of the checks for a target that holds labels which are no class, or no distribution."""
    problem = problem.without_groups()
    target, valid, spec = problem.target, problem.valid, _spec_of_labels(problem)
    if target.is_floating_point():
        wrong = bad_pixels(target, valid, spec, problem.config.tolerance)
        raise_bad_distribution("target", target, valid, wrong, spec)
    check_labels(problem.logits, target, valid, spec)


def _spec_of_labels(problem: Problem) -> LossSpec:
    return LossSpec((), (), ignore_index=problem.config.ignore_index, mode=problem.config.mode)


def check_exchanged_labels(problem: Problem) -> None:
    """Look again, in backward, at labels that were all right in forward.

    Raises:
        RuntimeError: on the CPU, and the text names the labels; elsewhere an asynchronous assert.
    """
    if problem.target.device.type != "cpu":
        problem = problem.without_groups()
        _, bad = validity(problem.logits, problem.target, problem.valid, _spec_of_labels(problem))
        assert_labels(problem, bad.any())
        return
    try:
        name_bad_labels(problem)
    except ValueError as error:
        raise RuntimeError(f"target changed between forward and backward: {error} {REMEDY}") from error


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, on which kernels are launched."""
    if tensor.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


def why_not_fused(
    weights: Sequence[Tensor], strides: Sequence[int], dilations: Sequence[int], pools: Sequence[int]
) -> str | None:
    """Why the fused kernels cannot run a network of these layers, or None if they can."""
    if not 2 <= len(weights) <= MAX_FUSED_LAYERS:
        return f"the proxy has {len(weights)} layers; the fused kernels take 2 to {MAX_FUSED_LAYERS}"
    for number, weight in enumerate(weights):
        if weight.shape[0] > MAX_FUSED_CHANNELS:
            return (
                f"the proxy's layer {number} has {weight.shape[0]} channels; "
                f"the fused kernels take up to {MAX_FUSED_CHANNELS}"
            )
        if strides[number] != 1 or dilations[number] != 1 or pools[number] != 0:
            return f"the proxy's layer {number} has a stride, a dilation or a pooling; the fused kernels take none"
    return None


def why_not_taken(
    whose: str, max_classes: int, logits: Tensor, weights: Sequence[Tensor], spec: LossSpec
) -> str | None:
    """What all fused kernels leave to the reference, or None; `whose` names the kernels. Looks at metadata only."""
    if logits.dtype == torch.float64:
        return f"{whose} compute in float32 at most, and the logits are float64"
    if not spec.from_logits:
        return f"{whose} take logits, not probabilities (from_logits=False)"
    if weights[0].shape[1] > max_classes:
        return f"{whose} take up to {max_classes} classes, the proxy has {weights[0].shape[1]}"
    for number, weight in enumerate(weights):
        rows, columns = weight.shape[2:]
        if rows != columns or rows % 2 == 0:
            return f"the proxy's layer {number} has a kernel of {rows}x{columns}; {whose} take odd squares"
    return None


# Defined by hand: what torch.library.custom_op wraps around a function costs 0.1 ms a call.
_library = torch.library.Library("semeda_fast", "FRAGMENT")
_EMPTY = Saved((0,), (0,), torch.float32)
_SAVED = (*INPUTS, "the proxy's parameters", "codes, which forward kept,", "saved_d, which forward kept,")


class FusedOps:
    """Registers the operators of one backend on creation; `run` is what the registry of backends wants.

    Args:
        name: of the backend, and of its operators.
        whose: names the kernels in messages.
        keys: dispatch keys, such as "CPU".
        saved: (logits, target, config) -> what forward keeps for backward.
    """

    def __init__(
        self,
        name: str,
        whose: str,
        keys: Sequence[str],
        saved: SavedFunction,
        forward: ForwardFunction,
        backward: BackwardFunction,
    ) -> None:
        self.name, self.whose = name, whose
        self.forward, self.backward, self._saved = forward, backward, saved
        tags = (torch.Tag.pt2_compliant_tag,)
        _library.define(
            f"{name}_forward(Tensor logits, Tensor target, Tensor? valid, Tensor? class_weight, Tensor flat, "
            "str config, bool save) -> (Tensor ce, Tensor semeda, Tensor per_layer, Tensor ce_weight, "
            "Tensor valid_count, Tensor codes, Tensor saved_d)",
            tags=tags,
        )
        _library.define(
            f"{name}_backward(Tensor d_ce, Tensor d_semeda, Tensor logits, Tensor target, Tensor? valid, "
            "Tensor? class_weight, Tensor flat, Tensor codes, Tensor saved_d, str config) -> Tensor",
            tags=tags,
        )
        for key in keys:
            _library.impl(f"{name}_forward", self._checked_forward, key)
            _library.impl(f"{name}_backward", self._checked_backward, key)
        full = f"semeda_fast::{name}"
        torch.library.register_fake(f"{full}_forward", self._fake_forward, lib=_library)
        torch.library.register_fake(f"{full}_backward", _fake_backward, lib=_library)
        torch.library.register_autograd(
            f"{full}_forward", self._differentiate, setup_context=_setup_context, lib=_library
        )
        torch.library.register_autograd(f"{full}_backward", self._no_second_derivative, lib=_library)
        self._forward_op = getattr(torch.ops.semeda_fast, f"{name}_forward")
        self._backward_op = getattr(torch.ops.semeda_fast, f"{name}_backward")

    def run(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        spec: LossSpec,
        check_target: bool,
    ) -> LossTerms:
        """The terms of `reference.loss_terms`, for arguments that passed its checks."""
        if not torch.compiler.is_compiling() and _has_tangent(logits):
            self._no_forward_mode()
        config = untraced(config_text, weights, spec, check_target, limit_for(target, check_target))
        if target.is_floating_point() and target.dtype not in _TARGETS:
            target = target.to(torch.float32)  # float8
        graph = recorded()
        save = graph or asks_gradient(logits)  # a graph may be trained later, whatever is asked for today
        graph = graph or torch.compiler.is_compiling()
        # One flat tensor: an operator with a list of tensors costs half a millisecond more a call.
        parts = [*weights, *biases]
        if graph:
            flat = torch.cat([tensor.reshape(-1) for tensor in parts])
        else:
            flat = torch._C._nn.flatten_dense_tensors(parts)  # the same in one call
        if flat.dtype != torch.float32:
            flat = flat.to(torch.float32)
        inputs = (logits, target, valid, class_weight, flat, config, save)
        if torch._C._len_torch_dispatch_stack():
            flops.announce(self._forward_op, self._backward_op)
        transformed = torch._C._are_functorch_transforms_active() or _is_wrapped(logits)
        if save and transformed and self._takes_functions():
            return LossTerms(*_Functional.apply(self, *inputs)[:5])
        if graph or transformed or not save:
            return LossTerms(*self._forward_op(*inputs)[:5])
        return LossTerms(*_Eager.apply(self, *inputs)[:5])

    def outputs(self, logits: Tensor, target: Tensor, config: FusedConfig, save: bool) -> Outputs:
        """Fresh memory for everything that forward returns."""
        shape = (images(logits), *target.shape[-2:]) if config.per_pixel else ()
        kept = self._saved(logits, target, config) if save else _EMPTY
        new = logits.new_empty
        return Outputs(
            new(shape, dtype=torch.float32),
            new(shape, dtype=torch.float32),
            new((len(config.sizes),), dtype=torch.float32),
            new((), dtype=torch.float32),
            new((), dtype=torch.int64),
            new(kept.codes, dtype=torch.uint8),
            new(kept.saved_d, dtype=kept.dtype),
        )

    def _run_forward(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        flat: Tensor,
        config: str,
        save: bool,
    ) -> tuple[Tensor, ...]:
        settings = parse_config(config)
        outputs = self.outputs(logits, target, settings, save)
        self.forward(Problem(logits, target, valid, class_weight, flat, settings), outputs)
        return tuple(outputs)

    def _checked_forward(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        flat: Tensor,
        config: str,
        save: bool,
    ) -> tuple[Tensor, ...]:
        """The same for callers of the operator, who may mix tensors; those that the loss hands over were checked."""
        settings = parse_config(config)
        check_consistent(Problem(logits, target, valid, class_weight, flat, settings))
        _check_sizes(logits, target, settings)
        return self._run_forward(logits, target, valid, class_weight, flat, config, save)

    def _fake_forward(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        flat: Tensor,
        config: str,
        save: bool,
    ) -> tuple[Tensor, ...]:
        return tuple(self.outputs(logits, target, parse_config(config), save))

    def _run_backward(
        self,
        d_ce: Tensor,
        d_semeda: Tensor,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        flat: Tensor,
        codes: Tensor,
        saved_d: Tensor,
        config: str,
    ) -> Tensor:
        """The gradient of the logits, in their dtype and, where they are dense, their strides."""
        d_logits = torch.empty_like(logits)
        problem = Problem(logits, target, valid, class_weight, flat, parse_config(config))
        if not (codes.numel() or saved_d.numel()):  # kernels would read past their ends
            check_kept(self._saved(logits, target, problem.config), codes, saved_d)
        d_ce, d_semeda = d_ce.to(torch.float32), d_semeda.to(torch.float32)
        self.backward(problem, codes, saved_d, d_ce, d_semeda, d_logits)
        return d_logits

    def _checked_backward(
        self,
        d_ce: Tensor,
        d_semeda: Tensor,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        flat: Tensor,
        codes: Tensor,
        saved_d: Tensor,
        config: str,
    ) -> Tensor:
        """The same for callers of the operator; what forward kept may come from a graph that keeps nothing."""
        problem = Problem(logits, target, valid, class_weight, flat, parse_config(config))
        check_consistent(problem)
        check_kept(self._saved(logits, target, problem.config), codes, saved_d)
        check_upstream(problem, d_ce, d_semeda)
        return self._run_backward(
            d_ce, d_semeda, logits, target, valid, class_weight, flat, codes, saved_d, config=config
        )

    def _differentiate(self, ctx: Any, d_ce: Tensor | None, d_semeda: Tensor | None, *_: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if ctx.facts is not None and ctx.facts != facts_of(saved):
            check_unchanged(_SAVED, ctx.facts, saved)
        logits, target, valid, class_weight, flat, codes, saved_d = saved
        # `target.data = other`, or a hook that gave a copy back.
        if ctx.target_at is not None and ctx.target_at != target.data_ptr():
            problem = Problem(logits, target, valid, class_weight, flat, parse_config(ctx.config))
            if problem.config.check_labels and not target.is_floating_point():
                check_exchanged_labels(problem)
        zero = logits.new_zeros((), dtype=torch.float32) if d_ce is None or d_semeda is None else None
        if ctx.per_pixel and zero is not None:
            zero = zero.expand(images(logits), *target.shape[-2:])
        d_ce, d_semeda = zero if d_ce is None else d_ce, zero if d_semeda is None else d_semeda
        try:
            d_logits = self.gradient(
                d_ce, d_semeda, logits, target, valid, class_weight, flat, codes, saved_d, config=ctx.config
            )
        except ValueError:  # memory was too small for its tensor
            if ctx.facts is not None:
                check_unchanged(_SAVED, ctx.facts, saved)
            raise
        return d_logits, None, None, None, None, None, None

    def gradient(self, *tensors: Tensor | None, config: str) -> Tensor:
        """Backward for the tensors of its schema, by the operator where somebody would see it."""
        inputs: tuple[Any, ...] = (*tensors, config)
        if not torch.is_grad_enabled() and plain(tensors):
            return self._run_backward(*inputs)
        if torch._C._len_torch_dispatch_stack():
            flops.announce(self._forward_op, self._backward_op)
        if torch._C._are_functorch_transforms_active() and self._takes_functions():
            d_logits: Tensor = _FunctionalBackward.apply(self, *inputs)
        else:
            d_logits = self._backward_op(*inputs)
        return d_logits

    def _takes_functions(self) -> bool:
        """Whether the transforms of torch.func at work take an autograd.Function, or operators; none takes both."""
        kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
        if _Transform.Functionalize not in kinds:
            return True
        if _Transform.Grad in kinds or _Transform.Jvp in kinds:
            raise NotImplementedError(
                f"torch.func.functionalize cannot be combined with derivatives of torch.func through the fused backend "
                f"{self.name!r}; leave functionalize out, since the backend changes nothing in place, or use "
                "SemedaLoss(backend='reference')"
            )
        return False

    def _no_forward_mode(self) -> None:
        raise NotImplementedError(
            f"the fused backend {self.name!r} has no forward-mode derivative (jvp, jacfwd, hessian); use "
            "SemedaLoss(backend='reference'), which has it"
        )

    def _no_second_derivative(self, ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"the fused backend {self.name!r} has no second derivative; use SemedaLoss(backend='reference'), "
            "which has all of them"
        )


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation asks for a derivative along with the value."""
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


_TARGETS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_Transform = torch._C._functorch.TransformType
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # also while the compiler looks at a transform
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(is_grads_batched=True)


def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody would see an operator: then its function is called, which saves the dispatcher's 50 us.

    A tensor of another class may watch operators itself, and need not have an address; where a sign is still to be
    turned (`z.conj().imag`), or several gradients lie in one tensor, the dispatcher makes the values first.
    """
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or _is_batched(t)):
            return False
    return not (watched() or torch.autograd._profiler_enabled())  # a profile names operators


class _Eager(torch.autograd.Function):
    """What `register_autograd` makes of the operators, without its walk through the schema: 50 us a call."""

    @staticmethod
    def forward(ctx: Any, operators: FusedOps, *inputs: Any) -> tuple[Tensor, ...]:
        direct = plain(inputs[:5])
        run = operators._run_forward if direct else operators._forward_op
        output: tuple[Tensor, ...] = run(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.operators = operators
        ctx.facts = facts_of((*inputs[:5], output[5], output[6]))
        if direct:
            ctx.target_at = inputs[1].data_ptr()
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *ctx.operators._differentiate(ctx, *gradients))


class _Functional(_Eager):
    """The same in the form that torch.func asks for, which binds its arguments anew in each call."""

    generate_vmap_rule = True  # the operators have none of their own: vmap calls them one by one

    @staticmethod
    def forward(operators: FusedOps, *inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        output: tuple[Tensor, ...] = operators._forward_op(*inputs)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_context(ctx, inputs[1:], output)
        ctx.operators = inputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        ctx.operators._no_forward_mode()


class _FunctionalBackward(torch.autograd.Function):
    """The gradient under torch.func, which always asks for one that could be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operators: FusedOps, *inputs: Any) -> Tensor:
        d_logits: Tensor = operators._backward_op(*inputs)
        return d_logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operators = inputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        ctx.operators._no_forward_mode()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        ctx.operators._no_second_derivative(ctx)


def _check_sizes(logits: Tensor, target: Tensor, config: FusedConfig) -> None:
    """ValueError for sizes that a graph was not traced for; who calls the loss itself never gets here with them."""
    (h, w), (height, width) = logits.shape[-2:], target.shape[-2:]
    if (h, w) == (height, width) or (config.upsample and h <= height and w <= width):
        return
    raise ValueError(
        f"logits of {h}x{w} for a target of {height}x{width}: this graph was traced for sizes that are "
        f"{'at most as large' if config.upsample else 'equal'}; trace it again for such sizes, or call the loss itself"
    )


def _fake_backward(d_ce: Tensor, d_semeda: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, valid, class_weight, flat, config, _ = inputs
    ctx.save_for_backward(logits, target, valid, class_weight, flat, output[5], output[6])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or each backward would fill zeros of the size of `codes`
    ctx.config = config
    ctx.facts = ctx.target_at = None  # compiled code keeps its tensors itself
    ctx.per_pixel = parse_config(config).per_pixel
