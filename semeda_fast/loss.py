"""SemedaLoss: the configuration and the frozen proxy as a module; the work is in functional.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends, checks
from .backends import Inputs, eager_loss, warmup
from .checks import check_layer_weights
from .counts import LossCounts, counts_of
from .functional import LossComponents, default_lambda, general_loss
from .options import OPTIONS, LossKeywords, LossOptions, changed, described, options_of, takes_options
from .plain import class_weights, void_label, whole_number
from .proxy.network import EdgeProxy, Float32Buffers
from .warn import warn_user

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from typing_extensions import Unpack

    _Attributes = LossOptions  # each option is an attribute
else:
    _Attributes = object


class SemedaLoss(Float32Buffers, _Attributes):
    """Cross-entropy plus SEMEDA (Chen, Dapogny, Cord, Pattern Recognition 108, 2020).

        loss = lambda_ce * CE + lambda_semeda * sum_l w_l D_l

    D_l is the mean distance, over valid pixels, between the proxy's layer-l features of the predicted
    softmax map and of the ground truth, divided by the layer's scale. backends/reference.py is the definition.

    The module has no parameters and an empty state_dict: no optimizer or checkpoint sees the proxy. DDP refuses to wrap
    it, since there is nothing to synchronise, and so does Accelerate's `prepare` with several processes on CPUs; use it
    unwrapped. `.to(device)` moves it, `.half()` and other casts leave it in fp32, `to_empty()` leaves its values alone.
    A pickle of it names public classes alone, which `semeda_fast.safe_globals` lists for `torch.load`.

    Args:
        proxy: an EdgeProxy, the path of a proxy file, or None: the bundled universal proxy for `num_classes`.
        num_classes: C, at least 2; needed where no proxy is given (binary mode: 2), else checked against the proxy's.
            With mode="multilabel" the number of planes, which a proxy for 2 classes sees one by one.
        lambda_ce: weight of cross-entropy.
        lambda_semeda: weight of the SEMEDA term, a number or a tensor of one element. Assign
            `criterion.lambda_semeda` between steps for a schedule; under torch.compile a number recompiles,
            a tensor changed in place (`criterion.lambda_semeda.fill_(0.3)`) does not. A learned weight is a tensor made
            of your parameter, assigned before each step; it gets its gradient. Default: 0.1 for "l1", 0.05 for
            "smooth_l1", 0.03 for "l2", with which the term pulls about as strongly as cross-entropy does in a
            trained network. docs/results.md says when it helps, and why to begin it after the first epochs
            (`schedule.ramp`).
        weight: [C] class weights of cross-entropy, as in nn.CrossEntropyLoss: a tensor, a list or a NumPy array; the
            SEMEDA term is not weighted. No checkpoint stores them, but one of nn.CrossEntropyLoss(weight) loads.
            With mode="multilabel" as in nn.BCEWithLogitsLoss: the mean is over entries, whatever they weigh.
        pos_weight: the weight of the foreground in cross-entropy, as in nn.BCEWithLogitsLoss: one number in binary
            mode, [C] with mode="multilabel".
        {options}

    Each option is an attribute, which may be assigned between steps.

    Shape:
        logits [N,C,H,W], or a volume [N,C,D,H,W], float32, bfloat16, float16 or float64, any layout (with upsample
        [N,C,h,w]); target [N,H,W], [N,1,H,W] or of a volume [N,D,H,W], [N,1,D,H,W] integers, or a float distribution
        of the logits' shape; with mode="multilabel" integers of the logits' shape, too. The loss is a 0-d fp32 tensor
        (fp64 for fp64 logits), or with reduction="none" of the shape of the target's pixels.

    Raises:
        ValueError, TypeError: at construction or at the call, naming what was expected and what came.
        ProxyFileError, FileNotFoundError: the proxy's path cannot be read.
        BackendUnavailableError: the backend named cannot run here.

    Example:
        >>> criterion = SemedaLoss(num_classes=21, ignore_index=255)
        >>> loss = criterion(logits, target)
        >>> loss.backward()
    """

    __doc__ = described(__doc__ or "")

    weight: Tensor | None
    pos_weight: Tensor | None
    _options: LossOptions | None = None  # of the short way
    _made_anew = ("_options",)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("lambda_ce", "lambda_semeda") and isinstance(value, nn.Parameter):
            raise TypeError(
                f"{name} is an nn.Parameter, and this module holds none; keep it in a module of your "
                f"own and assign a tensor made of it before each step, such as criterion.{name} = log_weight.exp()"
            )
        if name == "ignore_index":
            value = void_label(value)
        elif name in ("weight", "pos_weight"):
            value = class_weights(value, self.proxy.weights[0].device, name)
            if value is not None and value.dim() > 1:
                checks.check_class_weight(value, self.proxy.num_classes)
        super().__setattr__(name, value)
        self.__dict__["_options"] = None  # made anew of what is assigned

    @takes_options
    def __init__(
        self,
        proxy: EdgeProxy | str | os.PathLike[str] | None = None,
        *,
        num_classes: int | None = None,
        lambda_ce: float | Tensor = 1.0,
        lambda_semeda: float | Tensor | None = None,
        weight: Tensor | ArrayLike | None = None,
        pos_weight: Tensor | ArrayLike | None = None,
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        given = options_of(options, "l1", "SemedaLoss()")
        given.check()
        checks.check_lambda("lambda_ce", lambda_ce)
        checks.check_lambda("lambda_semeda", 0.0 if lambda_semeda is None else lambda_semeda)
        backends.check_name(given.backend)
        self.proxy = _resolve_proxy(proxy, num_classes, given.mode)
        if given.mode != "multiclass" and self.proxy.num_classes != 2:
            raise ValueError(
                f"mode={given.mode!r} needs a proxy with 2 classes, got one with {self.proxy.num_classes}; "
                "leave num_classes out, or give a proxy for 2 classes"
            )
        checks.check_classes(self.proxy.num_classes, given.mode, "SemedaLoss(mode='binary')")
        self.num_planes = None
        if given.mode == "multilabel":
            self.num_planes = None if num_classes is None else whole_number("num_classes", num_classes)
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            tensor = class_weights(value, name=name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone(), persistent=False)
        self._check_weights(given.mode)
        for name in ("lambda_ce", "lambda_semeda"):
            self.register_buffer(f"_{name}_tensor", None, persistent=False)
        for name in OPTIONS:
            setattr(self, name, getattr(given, name))
        self.distance = options.get("distance") or self.proxy.distance
        self.label_smoothing = float(given.label_smoothing)
        weights = self.proxy.layer_weights if given.layer_weights is None else given.layer_weights
        self.layer_weights = check_layer_weights(weights, self.proxy.num_layers)
        self.lambda_ce = lambda_ce
        self.lambda_semeda = default_lambda(self.distance) if lambda_semeda is None else lambda_semeda

    @property
    def lambda_ce(self) -> float | Tensor:
        """Weight of cross-entropy; assign a number >= 0 or a tensor of one element."""
        tensor = self._buffers["_lambda_ce_tensor"]  # by its name alone it takes a search through the module
        return self._lambda_ce if tensor is None else tensor

    @lambda_ce.setter
    def lambda_ce(self, value: float | Tensor) -> None:
        checks.check_lambda("lambda_ce", value)
        self._lambda_ce_tensor = value if isinstance(value, Tensor) else None
        self._lambda_ce = 0.0 if isinstance(value, Tensor) else float(value)

    @property
    def lambda_semeda(self) -> float | Tensor:
        """Weight of the SEMEDA term; assign a number >= 0 or a tensor of one element."""
        tensor = self._buffers["_lambda_semeda_tensor"]
        return self._lambda_semeda if tensor is None else tensor

    @lambda_semeda.setter
    def lambda_semeda(self, value: float | Tensor) -> None:
        checks.check_lambda("lambda_semeda", value)
        self._lambda_semeda_tensor = value if isinstance(value, Tensor) else None
        self._lambda_semeda = 0.0 if isinstance(value, Tensor) else float(value)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        valid_mask: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        counts: LossCounts | None = None,
        return_components: bool = False,
    ) -> Tensor | LossComponents:
        """The loss of `logits` [N,C,H,W] against `target` [N,H,W]; the class says which other shapes there are.

        Args:
            valid_mask: bool, of the shape of the target's pixels, True where a pixel counts; combined with
                target != ignore_index, except for a distribution [N,C,H,W]. With mode="multilabel" [N,H,W] holds for
                all planes.
            pixel_weight: float >= 0, of the same shapes: multiplies both terms at a pixel; means divide by the sum of
                weights. A pixel of weight 0 is no void: its neighbours still see it. `per_layer` is not weighted.
            counts: what means divide by in the place of this call's own counts; see `counts`.
            return_components: return a LossComponents (loss, ce, semeda, per_layer, valid_count); all but
                `loss` are detached, and everything stays on the device.
        """
        return self._run(logits, target, valid_mask, pixel_weight, counts, return_components, None)

    def scaled(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        valid_mask: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        counts: LossCounts | None = None,
        return_components: bool = False,
    ) -> Tensor | LossComponents:
        """`forward` for logits of any size: with upsample="bilinear", whatever the loss was built with.

        Where a volume has more slices than its logits, torch scales these before, with mode="trilinear".
        """
        if isinstance(logits, Tensor) and logits.dim() == 5 and isinstance(target, Tensor) and target.dim() > 3:
            size = list(target.shape[-3:])
            if logits.shape[self.slice_dim] != size[self.slice_dim - 2]:
                logits = nn.functional.interpolate(logits, size=size, mode="trilinear", align_corners=False)
        options = replace(self._chosen(), upsample="bilinear")
        return self._run(logits, target, valid_mask, pixel_weight, counts, return_components, options)

    def _run(
        self,
        logits: Tensor,
        target: Tensor,
        valid_mask: Tensor | None,
        pixel_weight: Tensor | None,
        counts: LossCounts | None,
        return_components: bool,
        options: LossOptions | None,
    ) -> Tensor | LossComponents:
        # By the name alone, `self.proxy` would take a search through the module.
        proxy: EdgeProxy = self._modules["proxy"]  # type: ignore[assignment]
        inputs = Inputs(logits, target, valid_mask, self._buffers["weight"])
        lambda_ce, lambda_semeda, pos_weight = self.lambda_ce, self.lambda_semeda, self._buffers["pos_weight"]
        more = None
        if not (pos_weight is None and pixel_weight is None and counts is None):
            more = pos_weight, pixel_weight, counts
        if self.num_planes is not None:
            self._check_planes(logits)
        compiling = torch.compiler.is_compiling()
        if options is None and not compiling:  # compiled code must not look at what calls leave behind
            options = self._options
            if options is None:
                options = self.__dict__["_options"] = self._chosen()
        elif options is None:
            options = self._chosen()
        if more is None and not return_components and not compiling:
            loss = eager_loss(inputs, proxy, lambda_ce, lambda_semeda, options)
            if loss is not None:
                return loss
        return general_loss(inputs, proxy, lambda_ce, lambda_semeda, options, return_components, more)

    def counts(
        self, target: Tensor, *, valid_mask: Tensor | None = None, pixel_weight: Tensor | None = None
    ) -> LossCounts:
        """What the means of a call with these arguments divide by.

        Counts add up: `counts=` with their sum gives each micro-batch its share of the loss of the whole batch, and
        the gradients add up to that of the whole batch. `LossCounts.all_reduce` adds over ranks.

        Args:
            target, valid_mask, pixel_weight: as in `forward`.

        Raises:
            ValueError, TypeError: as `forward` does.
        """
        options = self._chosen()
        checks.check_are_tensors(target, target, valid_mask)
        checks.check_more(None, None, pixel_weight, None, self.proxy.num_classes, options)
        return counts_of(target, valid_mask, self.weight, pixel_weight, options)

    def _check_planes(self, logits: Tensor) -> None:
        if isinstance(logits, Tensor) and logits.dim() > 1 and logits.shape[1] != self.num_planes:
            raise ValueError(
                f"logits have {logits.shape[1]} planes (shape {list(logits.shape)}) but the loss was built with "
                f"num_classes={self.num_planes}; build it with num_classes={logits.shape[1]}"
            )

    def _check_weights(self, mode: str) -> None:
        if self.pos_weight is not None:
            checks.check_pos_weight(self.pos_weight, mode)
        if mode != "multilabel":
            checks.check_class_weight(self.weight, self.proxy.num_classes)
        elif self.num_planes is not None:
            for name, given in (("weight", self.weight), ("pos_weight", self.pos_weight)):
                if given is not None and tuple(given.shape) not in ((), (1,), (self.num_planes,)):
                    raise ValueError(
                        f"{name} must hold one number a class, shape [{self.num_planes}], got shape {list(given.shape)}"
                    )

    def _chosen(self) -> LossOptions:
        return LossOptions(**{name: getattr(self, name) for name in OPTIONS})

    def warmup(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        labels_dtype: torch.dtype = torch.int64,
    ) -> float:
        """Compile the kernels that such logits need, so that the first step does not wait for it; see `warmup.warmup`.

        Args:
            shape: of the logits, (N, C, H, W); any shape compiles the same kernels.
            dtype, device, channels_last: of the logits; device None is the proxy's.
            labels_dtype: of the labels; a floating-point dtype stands for a distribution [N,C,H,W].

        Returns:
            the seconds that it took.

        Raises:
            ValueError, TypeError: a shape or dtype that the loss does not take.
        """
        return warmup(self, shape, dtype=dtype, device=device, channels_last=channels_last, labels_dtype=labels_dtype)

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script, which compiles a subset of Python that holds neither operators nor options."""
        raise NotImplementedError(
            "torch.jit.script cannot compile SemedaLoss; trace it by torch.jit.trace(criterion, (logits, target)), "
            "script the network alone, or use torch.export"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the class weights of nn.CrossEntropyLoss(weight) from a checkpoint of before, as that would."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in ("weight", "pos_weight"):
            self._take_weights(name, f"{prefix}{name}", state_dict, unexpected_keys, error_msgs)

    def _take_weights(
        self, name: str, key: str, state_dict: dict[str, Any], unexpected_keys: list[str], error_msgs: list[str]
    ) -> None:
        saved = state_dict.get(key)
        if not isinstance(saved, Tensor) or (name == "pos_weight" and self.mode == "multiclass"):
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        classes, many = self.proxy.num_classes, self.mode == "multilabel"
        if many:
            classes = saved.shape[0] if self.num_planes is None and saved.dim() else self.num_planes or 1
        expected = (classes,)
        fits = saved.numel() == 1 if name == "pos_weight" and not many else tuple(saved.shape) == expected
        if not fits:
            error_msgs.append(
                f"size mismatch for {key}: the checkpoint holds class weights of shape {list(saved.shape)}, and this "
                f"loss has {expected[0]} classes; remove the key, or build the loss for as many classes"
            )
            return
        if getattr(self, name) is None:
            source = "nn.CrossEntropyLoss" if self.mode == "multiclass" else "nn.BCEWithLogitsLoss"
            warn_user(
                f"the checkpoint's {key!r} holds class weights, as of {source}({name}=...), and SemedaLoss was "
                f"built without; it takes them. For the loss without them assign criterion.{name} = None after loading"
            )
        setattr(self, name, saved.detach().to(self.proxy.weights[0].device, torch.float32, copy=True))

    def extra_repr(self) -> str:
        shown = {"layer_weights": self.layer_weights, "distance": self.distance, **changed(vars(self._chosen()))}
        options = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"lambda_ce={self.lambda_ce}, lambda_semeda={self.lambda_semeda}{options}"


def _resolve_proxy(proxy: EdgeProxy | str | os.PathLike[str] | None, num_classes: int | None, mode: str) -> EdgeProxy:
    if num_classes is not None:
        num_classes = whole_number("num_classes", num_classes)
    if proxy is None:
        if mode == "multilabel" or (num_classes is None and mode == "binary"):
            num_classes = 2
        if num_classes is None:
            raise ValueError("pass num_classes=C for the bundled proxy, or a proxy (an EdgeProxy or its file's path)")
        return EdgeProxy.bundled(num_classes)
    if isinstance(proxy, Integral):
        raise TypeError(f"the first argument is a proxy, got {proxy!r}; write SemedaLoss(num_classes={proxy})")
    if isinstance(proxy, Tensor):
        raise TypeError("the first argument is a proxy, got a tensor; class weights are SemedaLoss(..., weight=...)")
    if isinstance(proxy, (str, os.PathLike)):
        proxy = EdgeProxy.load(proxy)
    if not isinstance(proxy, EdgeProxy):
        raise TypeError(
            f"proxy must be an EdgeProxy, a path or None, got {type(proxy).__name__}; "
            "turn an nn.Sequential into one with EdgeProxy.from_sequential(network)"
        )
    if mode != "multilabel" and num_classes is not None and num_classes != proxy.num_classes:
        remedies = [f"train a proxy for {num_classes} classes"]
        if num_classes < proxy.num_classes:
            remedies.append(f"cut this one with proxy.slice_classes({num_classes})")
        raise ValueError(
            f"num_classes={num_classes}, but the proxy has {proxy.num_classes} classes; leave num_classes out, "
            f"{', or '.join(remedies)}"
        )
    return proxy
