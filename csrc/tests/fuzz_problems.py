"""Problems for the fuzzer of native entries: sizes, and every buffer that they take, by formulas of its own.

What is right must be taken, and what is wrong in one place refused: `number_faults` and `memory_faults` list these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fuzz_memory import F32, FLOATS, INTEGERS, LAYOUTS, U8, WRITTEN, Arena, Memory, Tensor, strides_of
from hypothesis import strategies as st

Layer = tuple[int, int, int]  # out, in, kernel size
UNIT = 16
L1 = 0
CUDA_WIDTHS = {(16, 32, 2): FLOATS, (16, 32, 32, 2): FLOATS}  # two of the whitelist, in any precision


@dataclass(frozen=True)
class Problem:
    """Numbers as they are set, and the memory of every part."""

    n: int
    h: int
    w: int
    classes: int
    layers: tuple[Layer, ...]
    tensors: dict[str, Tensor]  # logits, target, d_ce, d_semeda, d_logits, and valid
    buffers: dict[str, Memory]  # what forward and backward take beside these
    numbers: dict[str, Any]  # further attributes
    cuda: bool = False

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    def params(self, module: Any, arena: Arena, *, leave_out: frozenset[str] = frozenset()) -> Any:
        """LossParams of a module; all that they point to lives in the arena."""
        params = module.LossParams()
        params.n, params.h, params.w, params.classes = self.n, self.h, self.w, self.classes
        for out, before, size in self.layers:
            params.add_layer(out, before, size, 0.5, 0.25)
        for name, value in self.numbers.items():
            setattr(params, name, value)
        for name, tensor in self.tensors.items():
            if name not in leave_out:
                setattr(params, name, module.View(*tensor.view(arena)))
        for name, memory in self.buffers.items():
            if name in leave_out:
                continue
            span = memory.make(arena)
            if name != "proxy":
                setattr(params, name, span)
            elif span is not None:
                params.set_proxy(span)
        return params

    def number_faults(self, memory: bool = True) -> Iterator[tuple[str, Problem]]:
        """Sizes and settings that are wrong, or, where an entry takes `memory`, wrong for what there is."""
        yield from self.image_faults(memory)
        for name, values in {"tap": (-1, 2), "distance": (-1, 3), "soft_channels": (-1, 7)}.items():
            for wrong in values:
                if name != "soft_channels" or self.numbers.get("soft"):
                    yield f"{name} is {wrong}", self.having(**{name: wrong})
        if self.classes != 2:
            yield "binary of other classes", self.having(binary=True)
        if memory:
            soft = not self.numbers.get("soft")
            yield "soft exchanged", self.having(soft=soft, soft_channels=self.classes)
        small: tuple[dict[str, int], ...] = (
            {"logits_h": self.h + 1, "logits_w": max(self.w, 1)},
            {"logits_h": max(self.h, 1), "logits_w": self.w + 1},
            {"logits_h": 1, "logits_w": 0},
            {"logits_h": -1},
        )
        for wrong_size in small:
            yield f"logits scaled up from {wrong_size}", self.having(**wrong_size)
        for wrong in (0, -1, 2**31 - 1, self.classes + 1):
            yield f"classes are {wrong}", replace(self, classes=wrong)
        if not memory and not self.cuda:
            (out, _, size), *rest = self.layers
            yield "too many classes", replace(self, classes=1025, layers=((out, 1025, size), *rest))
        if self.buffers["class_weight"].absent is False and memory:
            yield "no rows of class weights", self.having(weight_rows=0)
            yield "more rows of class weights", self.having(weight_rows=self.numbers["weight_rows"] + 1)
        yield from self._layer_faults(memory)

    def having(self, **numbers: Any) -> Problem:
        """With other numbers."""
        return replace(self, numbers=self.numbers | numbers)

    def image_faults(self, memory: bool) -> Iterator[tuple[str, Problem]]:
        """Of n, h and w."""
        for name in ("n", "h", "w"):
            others = [getattr(self, other) for other in ("n", "h", "w") if other != name]
            for wrong in (-1, 2**41, 2**63 - 1, -(2**63)):
                yield f"{name} is {wrong}", replace(self, **{name: wrong})
            if memory and all(others):
                yield f"{name} is one more", replace(self, **{name: getattr(self, name) + 1})
        yield "too many pixels", replace(self, n=2**40, h=2**40)

    def _layer_faults(self, memory: bool) -> Iterator[tuple[str, Problem]]:
        first, *rest = self.layers
        out, before, size = first
        for name, layers in {
            "no layers": (),
            "one layer": (first,),
            "nine layers": self.layers + (self.layers[-1],) * (9 - len(self.layers)),
            "a layer of no channels": ((0, before, size), *rest),
            "a layer of too many channels": ((65, before, size), *rest),
            "a layer of a huge number of channels": ((2**31 - 1, before, size), *rest),
            "a layer of other inputs": ((out, before + 1, size), *rest),
            "a layer of no inputs": ((out, 0, size), *rest),
            "an even kernel": ((out, before, size + 1), *rest),
            "a negative kernel": ((out, before, -size), *rest),
            "a huge kernel": ((out, before, 2**31 - 1), *rest),
        }.items():
            yield name, replace(self, layers=layers)
        if memory and not self.cuda:
            yield "a larger kernel than the proxy has", replace(self, layers=((out, before, size + 2), *rest))

    def memory_faults(self, names: frozenset[str]) -> Iterator[tuple[str, Problem]]:
        """One of the named tensors or buffers is wrong."""
        for name, tensor in self.tensors.items():
            if name in names:
                for what, wrong in tensor.faults():
                    yield f"{name}: {what}", replace(self, tensors=self.tensors | {name: wrong})
        for name, memory in self.buffers.items():
            if name in names:
                for what, memory_wrong in memory.faults():
                    yield f"{name}: {what}", replace(self, buffers=self.buffers | {name: memory_wrong})


READ = frozenset({"logits", "target", "valid", "class_weight", "proxy"})
FORWARD = READ | {"codes", "saved_d", "ce_map", "semeda_map", "terms", "counts"}
BACKWARD = READ | {"codes", "saved_d", "d_ce", "d_semeda", "d_logits"}


@st.composite
def problems(draw: st.DrawFn, cuda: bool = False) -> Problem:
    """Right ones, of small images; for the CUDA module such as its kernels take."""
    small = st.integers(1, 7)
    n, h = draw(st.integers(1, 2)), draw(small)
    w = draw(small if cuda else st.sampled_from([1, 2, 5, 15, 16, 17, 33]))
    if not cuda and draw(st.integers(0, 15)) == 0:
        n, h, w = draw(st.permutations([0, 2, 3]))
    binary = draw(st.integers(0, 3)) == 0
    classes = 2 if binary else draw(st.integers(1, 6))
    if cuda:
        widths = draw(st.sampled_from(list(CUDA_WIDTHS)))
        sizes = (3,) * len(widths)
    else:
        count = draw(st.integers(2, 4))
        widths = tuple(draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
        sizes = tuple(draw(st.lists(st.sampled_from([1, 3, 5]), min_size=count, max_size=count)))
    layers = tuple(zip(widths, (classes, *widths), sizes, strict=False))
    soft = not cuda and draw(st.integers(0, 3)) == 0
    channels = 1 if binary else classes
    numbers: dict[str, Any] = {
        "binary": binary,
        "tap": draw(st.integers(0, 1)),
        "distance": L1 if cuda else draw(st.integers(0, 2)),
        "ignore_index": draw(st.sampled_from([-100, 255, 0, 2**63 - 1])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "weight_rows": draw(st.integers(1, 3)),
        "threads": draw(st.integers(1, 3)),
    }
    low_h, low_w = h, w
    if not cuda and h and w and draw(st.integers(0, 3)) == 0:
        low_h, low_w = draw(st.integers(1, h)), draw(st.integers(1, w))
        numbers |= {"logits_h": low_h, "logits_w": low_w}
    logits = draw(tensors((n, channels, low_h, low_w), FLOATS))
    if soft:
        of_target = draw(st.sampled_from([1, 2])) if binary else classes
        numbers |= {"soft": True, "soft_channels": of_target}
        target = draw(tensors((n, of_target, h, w), FLOATS, WRITTEN))
    else:
        target = draw(tensors((n, 1, h, w), INTEGERS, WRITTEN))
    parts = {"logits": logits, "target": target}
    if draw(st.booleans()):
        parts["valid"] = draw(tensors((n, 1, h, w), (U8,)))
    maps = not cuda and draw(st.integers(0, 2)) == 0
    is_map = {"d_ce": not cuda and draw(st.booleans()), "d_semeda": maps}
    for name, whole in is_map.items():
        sizes_of_d = (n, 1, h, w) if whole else (1, 1, 1, 1)
        parts[name] = draw(tensors(sizes_of_d, (F32,))) if whole else _scalar()
    parts["d_logits"] = replace(
        draw(tensors((n, channels, low_h, low_w), FLOATS, WRITTEN)), dtype=logits.dtype, dtypes=(logits.dtype,)
    )
    if maps:
        numbers["d_semeda_is_map"] = True
    weights = sum(out * before * size * size + out for out, before, size in layers)
    buffers = {
        "class_weight": Memory(4 * classes * numbers["weight_rows"], optional=True, absent=draw(st.booleans())),
        "proxy": Memory(4 * weights),
        "terms": Memory(4 * (3 + len(layers))),
        "counts": Memory(16, 8),
        **_kept(n, h, w, widths, numbers, cuda, absent=draw(st.integers(0, 3)) == 0),
    }
    if not cuda:
        for name in ("ce_map", "semeda_map"):
            buffers[name] = Memory(4 * n * h * w, optional=True, absent=not maps)
    return Problem(n, h, w, classes, layers, parts, buffers, numbers, cuda)


def _scalar() -> Tensor:
    return Tensor((1, 1, 1, 1), (0, 0, 0, 0), F32, (F32,))


@st.composite
def tensors(
    draw: st.DrawFn,
    sizes: tuple[int, int, int, int],
    dtypes: tuple[int, ...],
    layouts: tuple[str, ...] = LAYOUTS,
) -> Tensor:
    """A right tensor. A target has memory for each pixel, or an image more would be right, too."""
    return Tensor(sizes, strides_of(sizes, draw(st.sampled_from(layouts))), draw(st.sampled_from(dtypes)), dtypes)


def _kept(
    n: int, h: int, w: int, widths: tuple[int, ...], numbers: dict[str, Any], cuda: bool, absent: bool
) -> dict[str, Memory]:
    """Codes and saved differences, as kernels/README.md and csrc/cuda/codes.h describe them."""
    *hidden, last = widths
    if cuda:
        per_pixel = sum(3 * ((out + 7) // 8) for out in hidden) + (2 * last + 7) // 8
        return {"codes": Memory(n * h * w * per_pixel, 1, optional=True, absent=absent)}
    units = (w + UNIT - 1) // UNIT
    if numbers["distance"] == L1:
        planes = sum(hidden) * (3 if numbers["tap"] == 0 else 2) + 2 * last
        floats = 0
    else:
        planes, floats = sum(hidden), units * UNIT * sum(widths)
    return {
        "codes": Memory(n * h * units * 2 * planes, 1, optional=True, absent=absent),
        "saved_d": Memory(4 * n * h * floats, optional=absent, absent=absent),
    }
