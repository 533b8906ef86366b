"""Every option of the loss, once: name, type, default, meaning, check.

Signatures, documentation, checks, the key of prepared calls, the operator's arguments and the kernels' settings are
made of this record. A new option is declared here, and read where it acts.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from .plain import void_label, whole_number

DISTANCES = ("l1", "l2", "smooth_l1")
MODES = ("multiclass", "binary", "multilabel")
REDUCTIONS = ("mean", "sum", "none")
EMPTY = ("zero", "nan")
UPSAMPLE = ("bilinear",)
VALIDATE = ("auto", "always", "never")

Check = Callable[[str, Any], object]
F = TypeVar("F", bound=Callable[..., Any])


def _anything(name: str, value: Any) -> None:
    """For what is checked elsewhere, beside what it has to fit."""


def _one_of(*choices: str, none: bool = False) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in choices and not (none and value is None):
            listed = ", ".join(map(repr, choices))
            expected = f"None or {listed}" if none and len(choices) == 1 else f"one of {listed}"
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    return check


def _slice_dim(name: str, value: Any) -> None:
    if whole_number(name, value) not in (2, 3, 4):
        raise ValueError(f"{name} must be 2, 3 or 4, a dimension of logits [N,C,D,H,W], got {value!r}")


def _fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _option(default: Any, meaning: str, check: Check = _anything, *, kernels: bool = True) -> Any:
    """A field of the record.

    Args:
        check: called with name and value; raises ValueError or TypeError.
        kernels: whether backends read it; else kernels are the same for each of its values.
    """
    return field(default=default, metadata={"meaning": " ".join(meaning.split()), "check": check, "kernels": kernels})


@dataclass(unsafe_hash=True, kw_only=True)  # a frozen one takes 4 us to make; nobody changes one in place
class LossOptions:
    """The options of a loss, as the caller gave them."""

    layer_weights: Sequence[float] | None = _option(
        None, "w_l, one number >= 0 a layer; default: what the proxy's file says."
    )
    distance: str = _option(  # chosen before the record is made
        None,
        """"l1", "l2" or "smooth_l1" (beta 1); default: what the proxy's file says.""",
        _one_of(*DISTANCES, none=True),
    )
    ignore_index: int = _option(
        -100,
        """the void label; None means -100, which is no label. Void pixels are the zero vector in both branches and
        count nowhere. A float distribution [N,C,H,W] has no labels, so there void is what `valid_mask` says alone.""",
        lambda _, value: void_label(value),
    )
    label_smoothing: float = _option(0.0, "of cross-entropy, in [0, 1].", _fraction)
    reduction: str = _option(
        "mean",
        """"mean" over valid pixels, "sum", or "none": of the target's shape, zero at void pixels.""",
        _one_of(*REDUCTIONS),
    )
    mode: str = _option(
        "multiclass",
        """"multiclass"; "binary": logits [N,1,H,W], one sigmoid against two classes; "multilabel": logits and target
        [N,C,H,W], overlapping classes, each plane a binary map with a sigmoid of its own, void entry by entry.""",
        _one_of(*MODES),
    )
    slice_dim: int = _option(
        2,
        """of a volume's logits [N,C,D,H,W], 2, 3 or 4: the term sees each slice along it as an image.""",
        _slice_dim,
        kernels=False,
    )
    from_logits: bool = _option(
        True, "False takes probabilities [N,C,H,W] ([N,1,H,W] in binary mode) in the place of logits."
    )
    empty: str = _option(
        "zero",
        """"zero" makes loss and gradient 0 where no pixel is valid, "nan" makes them NaN as torch does.""",
        _one_of(*EMPTY),
        kernels=False,
    )
    upsample: str | None = _option(
        None,
        """"bilinear" takes logits of any size and scales them to the target's, as
        torch.nn.functional.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False) does.
        The CPU kernels do it while they read (to at least twice the size in both directions), so neither the large
        logits nor their gradient is ever stored; elsewhere torch does it first. None: both have one size.""",
        _one_of(*UPSAMPLE, none=True),
    )
    backend: str = _option(
        "auto", """"auto", or "reference", "cpu", "triton", "cuda"; see `backend_info()`.""", kernels=False
    )
    validate: str = _option(
        "auto",
        """"auto" checks labels, soft targets and probabilities at once on the CPU and by an asynchronous assert
        elsewhere; "always" waits for the device, says what is wrong there, too, and checks logits; "never" checks none
        (a label that is no class then makes the loss NaN, it is never read out of bounds).""",
        _one_of(*VALIDATE),
        kernels=False,
    )

    def check(self) -> None:
        """Raise ValueError or TypeError for an option that means nothing."""
        for name, check in _CHECKS:
            check(name, getattr(self, name))

    @property
    def per_pixel(self) -> bool:
        """Whether the terms are asked for as maps, and not as their sums over all pixels."""
        return self.reduction == "none"


class LossKeywords(TypedDict, total=False):
    """The options as callers may give them, for editors and type checkers; a test holds it against LossOptions."""

    layer_weights: Sequence[float] | None
    distance: str | None
    ignore_index: int | None
    label_smoothing: float
    reduction: str
    mode: str
    slice_dim: int
    from_logits: bool
    empty: str
    upsample: str | None
    backend: str
    validate: str


OPTIONS = tuple(each.name for each in fields(LossOptions))
OUTSIDE_KERNELS = {each.name: each.default for each in fields(LossOptions) if not each.metadata["kernels"]}
_CHECKS = tuple((each.name, each.metadata["check"]) for each in fields(LossOptions))
_DEFAULTS = {each.name: each.default for each in fields(LossOptions)}


def options_of(given: Mapping[str, Any], distance: str, who: str) -> LossOptions:
    """The record of keyword arguments, not yet checked.

    Args:
        distance: that of the proxy, where none is given.
        who: was called, for the error.

    Raises:
        TypeError: a keyword that is no option, or an ignore_index that is no integer.
        ValueError: an ignore_index of more than 64 bits.
    """
    values = {**_DEFAULTS, **given}
    if len(values) != len(OPTIONS):
        _raise_unknown(given, who)
    if values["distance"] is None:
        values["distance"] = distance
    if type(values["ignore_index"]) is not int:
        values["ignore_index"] = void_label(values["ignore_index"])
    return LossOptions(**values)


def _raise_unknown(given: Mapping[str, Any], who: str) -> None:
    unknown = next(name for name in given if name not in OPTIONS)
    near = difflib.get_close_matches(unknown, OPTIONS, 1)
    remedy = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(OPTIONS)}"
    raise TypeError(f"{who} got an unexpected keyword argument {unknown!r}; {remedy}")


def changed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that do not have their default."""
    return {name: value for name, value in options.items() if value != _DEFAULTS[name]}


def takes_options(function: F) -> F:
    """Write the options into the signature of a function that takes them as `**options`."""
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    named = [each for each in signature.parameters.values() if each.kind is not kinds.VAR_KEYWORD]
    given = LossKeywords.__annotations__
    for each in fields(LossOptions):
        note = getattr(given[each.name], "__forward_arg__", given[each.name])
        named.append(kinds(each.name, kinds.KEYWORD_ONLY, default=each.default, annotation=note))
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


def described(text: str) -> str:
    """A docstring with each option and its meaning in the place of the line `{options}`."""
    lines = []
    for line in text.split("\n"):
        if line.strip() != "{options}":
            lines.append(line)
            continue
        indent = line[: line.index("{")]
        for each in fields(LossOptions):
            lines += textwrap.wrap(
                f"{each.name}: {each.metadata['meaning']}",
                width=120,
                initial_indent=indent,
                subsequent_indent=indent + "    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
