"""What to do about labels and distributions that are none: remedies for messages.

Each names the code to write, and `tests/test_advice.py` runs that code. Where several causes are possible, the text
says by what to tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MANY = 32  # distinct wrong labels, from which on a map is no label map
MOST_CLASSES = 1023  # a number above is no class
BUNDLED_CLASSES = 256  # of the bundled proxy
VOID = 255  # what most data sets have


class Place(NamedTuple):
    """Where labels are, and so in which words to speak of them.

    Attributes:
        name: of the labels in code.
        verb: what is done with changed ones.
        numpy: whether they are a NumPy array, no tensor.
        files: whether they lie in image files, which are to be written anew.
        network: whether a network has as many channels as there are classes.
    """

    name: str
    verb: str = "pass"
    numpy: bool = False
    files: bool = False
    network: bool = False


CALL = Place("target", network=True)  # of the loss
MASKS = Place("masks")
ITEMS = Place("mask", "let the Dataset give")
ARRAY = Place("labels", numpy=True)
FILES = Place("mask", numpy=True, files=True)


class Labels(NamedTuple):
    """What a label map holds.

    Attributes:
        present: all labels that occur, sorted, void ones too.
        wrong: those of them that are neither a class nor ignore_index, sorted.
        num_classes, ignore_index: as they are set; None for no ignore_index.
        binary: whether the loss is binary, so that more classes take another mode.
    """

    present: Sequence[int]
    wrong: Sequence[int]
    num_classes: int
    ignore_index: int | None
    place: Place = CALL
    binary: bool = False

    @property
    def has_void(self) -> bool:
        """Whether ignore_index occurs, so that it is the void label already."""
        return self.ignore_index in self.present

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def wide(self) -> str:
        """The labels in a dtype that holds any void label; files keep theirs, which has been written before."""
        if self.place.files:
            return self.name
        return f"{self.name}.astype(np.int32)" if self.place.numpy else f"{self.name}.long()"

    def option(self, name: str, value: int) -> str:
        """As a keyword argument and, of files, for the command line, too."""
        return f"{name}={value}" + (f" (--{name.replace('_', '-')} {value})" if self.place.files else "")

    def classes(self, number: int) -> str:
        """How so many classes are set."""
        channels = " and as many channels" if self.place.network else ""
        if self.binary:
            return f"use mode='multiclass' with num_classes={number}{channels}"
        if self.place.network and number > BUNDLED_CLASSES:
            return f"pass a proxy for {number} classes, which train_proxy makes,{channels}"
        return f"pass {self.option('num_classes', number)}{channels}"

    def void(self, labels: Sequence[int]) -> str:
        """How labels are made void."""
        if len(labels) == 1 and not self.has_void:
            return f"pass {self.option('ignore_index', labels[0])}"
        label, note = self.void_label()
        return self.changed(self.where(self.among(labels), label, self.wide)) + note

    def void_label(self) -> tuple[int, str]:
        """The label that pixels get to become void, and what is to be set for it."""
        known = self.ignore_index
        if known is not None and (known >= 0 or not self.place.files):  # image files hold no negative labels
            return known, ""
        return VOID, f" and {self.option('ignore_index', VOID)}"

    def changed(self, code: str) -> str:
        """How the labels are changed: code is an expression of them."""
        if not self.place.files:
            return f"{self.place.verb} {code}"
        return f"write each file anew: mask = np.array(Image.open(path)); Image.fromarray({code}).save(path)"

    def where(self, condition: str, yes: int, no: str) -> str:
        return f"{'np' if self.place.numpy else 'torch'}.where({condition}, {yes}, {no})"

    def among(self, labels: Sequence[int]) -> str:
        """The condition that a pixel holds one of some labels."""
        if len(labels) == 1:
            return f"{self.name} == {labels[0]}"
        if self.place.numpy:
            return f"np.isin({self.name}, {list(labels)})"
        return f"torch.isin({self.name}, torch.tensor({list(labels)}, device={self.name}.device))"

    def numbered(self, levels: Sequence[int]) -> str:
        """The place of each label among some."""
        if self.place.numpy:
            return f"np.searchsorted({list(levels)}, {self.name}).astype(np.uint8)"
        return f"torch.bucketize({self.name}, torch.tensor({list(levels)}, device={self.name}.device))"


def advice_on(
    labels: Tensor, num_classes: int, ignore_index: int | None, place: Place = CALL, binary: bool = False
) -> str:
    """`label_advice` for integer labels of any shape, of which some are neither a class nor ignore_index."""
    present = [int(v) for v in labels.to(torch.int64).unique().tolist()]  # uint16 has no unique everywhere
    wrong = [v for v in present if v != ignore_index and not 0 <= v < num_classes]
    return label_advice(Labels(present, wrong, num_classes, ignore_index, place, binary))


def lost_foreground(ignore_index: int, place: Place) -> str:
    """What to say where nothing but one class was found: "" where the void label has nothing to do with it."""
    if ignore_index != VOID:
        return ""
    return f"; with ignore_index=255: {label_advice(Labels([0, VOID], [VOID], 2, None, place))}"


def label_advice(labels: Labels) -> str:
    """What most likely went wrong with labels, and what to write; without a full stop."""
    if len(labels.wrong) > MANY:
        where = "folder" if labels.place.files else "map"
        return f"So many values look like a photograph or instance numbers, not labels: is it the right {where}?"
    special = _binary_mask(labels) or _greys(labels)
    if special:
        return special
    never = [v for v in labels.wrong if v < 0 or v > MOST_CLASSES or v == VOID]
    others = [v for v in labels.wrong if v not in never]
    parts = []
    if never:
        parts.append(_void(labels, never))
    alone = not never or (len(never) == 1 and 0 not in labels.present and not labels.has_void)
    if others == [labels.num_classes] and alone:
        parts.append(_one_too_large(labels, never))
    elif others:
        parts.append(_more_classes(labels, others, bool(never)))
    return "; ".join(parts)


def _binary_mask(labels: Labels) -> str:
    """For 0 and 255 alone."""
    used = set(labels.present) - ({labels.ignore_index} - {VOID})
    if labels.wrong != [VOID] or not used <= {0, VOID}:
        return ""
    code = f"{labels.name} // 255"
    if labels.has_void:  # a division would change it
        code = labels.where(f"{labels.name} == 255", 1, labels.name)
    binary = f"0 and 255 alone are a binary mask as image files store it: {labels.changed(code)}"
    if labels.num_classes == 2:
        return f"{binary}, unless other masks of the data hold a 1, too: then look at one of those first"
    return (
        f"{binary} and {labels.classes(2)}, unless other masks of the data hold more labels: then 255 is what "
        "ignore_index is for"
    )


def _greys(labels: Labels) -> str:
    """For labels that are drawn as evenly spaced greys, black and white among them."""
    levels = [v for v in labels.present if v == VOID or v != labels.ignore_index]
    steps = len(levels) - 1
    even = steps >= 2 and all(abs(v - VOID * i / steps) <= 1 for i, v in enumerate(levels))
    if not even or not set(levels[1:-1]) <= set(labels.wrong):
        return ""
    shown = f"{', '.join(map(str, levels[:-1]))} and {levels[-1]}"
    renumbered = labels.changed(labels.numbered(levels))
    if labels.num_classes == 2 and steps == 2:
        void, note = labels.void_label()
        code = labels.where(f"{labels.name} == {levels[1]}", void, f"{labels.wide} // 255")
        return (
            f"{shown} are the greys of a trimap: if {levels[1]} marks unknown pixels, {labels.changed(code)}{note}; if "
            f"it is a class, {renumbered} and {labels.classes(3)}"
        )
    text = f"{shown} are evenly spaced greys: if the data holds no others, {renumbered}"
    return text if steps < labels.num_classes else f"{text} and {labels.classes(steps + 1)}"


def _void(labels: Labels, never: Sequence[int]) -> str:
    """For labels that can hardly be classes."""
    advice = labels.void(never)
    if len(never) > 1:
        return f"{', '.join(map(str, never[:5]))} can hardly be classes: if they mark void or nodata, {advice}"
    if never[0] == VOID:
        return f"255 marks void in most data sets: {advice}"
    kind = "Negative values are no classes" if never[0] < 0 else f"{never[0]} can hardly be a class"
    return f"{kind}: if {never[0]} marks void or nodata, {advice}"


def _one_too_large(labels: Labels, never: Sequence[int]) -> str:
    """For labels up to C itself: they start at 1, or a class is missing."""
    c = labels.num_classes
    void = list(never) or ([labels.ignore_index] if labels.has_void and labels.ignore_index is not None else [])
    parts = [f"if {c} is a class, {labels.classes(c + 1)}"]
    if not never:
        parts.insert(0, f"if {c} marks void, {labels.void([c])}")
    if 0 not in labels.present:
        less = f"{labels.name} - 1"
        code = labels.where(f"{labels.name} == {void[0]}", void[0], less) if void else less
        parts.insert(0, f"if labels start at 1 (there is no 0 here), {labels.changed(code)}")
    else:
        label = VOID if labels.place.files else -1
        code = labels.where(labels.among(sorted({0, *void})), label, f"{labels.wide} - 1")
        note = labels.option("ignore_index", label)
        parts.append(f"if 0 marks void and classes start at 1, {labels.changed(code)} and {note}")
    return "; ".join(parts)


def _more_classes(labels: Labels, others: Sequence[int], beside_void: bool) -> str:
    """For labels that may be classes, but are too large."""
    which = "the others" if beside_void else "this is a class" if len(others) == 1 else "these"
    verb = "" if which == "this is a class" else " are classes"
    text = f"{labels.classes(others[-1] + 1)} if {which}{verb}"
    return text if beside_void else f"{text}; to make void what is none, {labels.void(others)}"


def distribution_advice(values: Tensor, wrong: Tensor, one_channel: bool, masked: bool) -> str:
    """What most likely went wrong with a soft target, and what to write; without a full stop.

    Args:
        values: [P,C] of all valid pixels, float64.
        wrong: [B,C] of those that hold no distribution.
        one_channel: whether it is the probability of class 1 alone.
        masked: whether a valid_mask was given.
    """

    def mask(code: str) -> str:
        return f"valid_mask=valid_mask & ({code})" if masked else f"valid_mask={code}"

    if not bool(values.isfinite().all()):
        cause = "NaN and infinity are no probabilities: look for a division by zero"
        return f"{cause}; to leave such pixels out, pass {mask('target.isfinite().all(dim=1)')}"
    low, high = float(values.min()), float(values.max())
    if one_channel:
        if low >= -0.5 and high <= 1.5:
            return "If an interpolation overshoots, pass target.clamp(0, 1)"
        if low < 0:
            return "If these are logits, pass target.sigmoid()"
        return "If these are the greys of an image, pass target / 255"
    if bool(((values == 0) | (values == VOID)).all()):
        return "0 and 255 are the greys of an image: pass target / 255"
    total = "target.sum(dim=1, keepdim=True)"
    sums = wrong.clamp(min=0).sum(dim=1)
    empty = sums < 1e-3
    if low < -0.5:
        return "If these are logits, pass target.softmax(dim=1)"
    if bool(empty.all()):
        return f"If pixels without any class are void, pass {mask('target.sum(dim=1) > 0.5')}"
    if low < 0:
        return "If an interpolation overshoots, pass target.clamp(min=0) / target.clamp(min=0).sum(dim=1, keepdim=True)"
    scaled = f"to make them sum to 1, pass target / {total}"
    if bool(empty.any()):
        scaled = f"to make them sum to 1, pass target / {total}.clamp(min=1e-3) and {mask('target.sum(dim=1) > 1e-3')}"
    if high > 1:
        return f"If the classes share a pixel so, {scaled}"
    mask_too = ", valid_mask=valid_mask" if masked else ""
    return (
        f"If several classes share a pixel, {scaled}; if each has a sigmoid of its own, call "
        f"SemedaLoss(mode='multilabel')(logits, target{mask_too})"
    )
