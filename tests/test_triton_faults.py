"""Each Triton kernel alone against PyTorch in float64, and the proof that these checks see faults.

`FAULTS` are seeded, one at a time, into a copy of the kernels' sources, and the kernel's check has to go red.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
from triton_checks import (
    CHECKS,
    Check,
    check_finish,
    check_first_layer,
    check_hidden_layer,
    check_last_layer,
    check_layer_bwd,
    check_logits_bwd,
    check_prepare,
    check_saturation,
    check_soft_softmax,
    check_softmax,
    check_sum,
    check_tile_class,
)

from semeda_fast import kernels as package


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_kernel_alone(check: Check) -> None:
    check(package)


class Fault(NamedTuple):
    """A text of one source file, which occurs once, what replaces it, and the check that has to see it."""

    file: str
    check: Check
    text: str
    wrong: str


CODES = """            if POST:
                store_bits(codes, 0, on & (below == 0), here, P, in_image, OUT)
                store_bits(codes, 1, on & (above == 0), here, P, in_image, OUT)
            else:
                store_bits(codes, 0, above, here, P, in_image, OUT)
                store_bits(codes, 1, below, here, P, in_image, OUT)
"""
SWAPPED = CODES.replace("above", "\0").replace("below", "above").replace("\0", "below")

# (file, check) -> name -> (text, what replaces it)
SEEDED: dict[tuple[str, Check], dict[str, tuple[str, str]]] = {
    ("geometry", check_softmax): {
        "tile rows": ("(rest // tiles_x) * BLOCK_H", "(rest % tiles_x) * BLOCK_H"),
        "tile of the next image": ("n = tile // tiles_per_image", "n = tile * 0"),
        "void label": ("v = v & (wide != ignore_index)", "v = v & (wide != -1)"),
        "labels beyond the classes": ("(wide >= C)", "(wide > 2 * C)"),
        "padded classes": ('z, float("-inf"))', "z, 0.0)"),
    },
    ("geometry", check_saturation): {
        "infinity in fp16": ("tl.minimum(tl.maximum(value, -65504.0), 65504.0)", "value * 1.0"),
    },
    ("softmax", check_softmax): {
        "softmax without maximum": ("z - tl.max(z, axis=1)[:, None]", "z"),
        "void input": ("tl.where(v[:, None], p - goal, 0.0)", "p - goal"),
        "class weight": ("ce = -(1.0 - label_smoothing) * own *", "ce = -(1.0 - label_smoothing) *"),
        "row of partial sums": ("partial + 2 * tiles + tile", "partial + 3 * tiles + tile"),
        "writes beside the image": ("labels.dtype.element_ty), mask=inside)", "labels.dtype.element_ty))"),
        "bad label unseen": ('ce = tl.where(bad, float("nan"), ce)', "ce = ce * 1.0"),
    },
    ("softmax", check_soft_softmax): {
        "sum of a distribution": ("(tl.abs(tl.sum(goal, axis=1) - 1.0) < tolerance)", "(tl.sum(goal, axis=1) < 1.5)"),
        "values below 0": (" & (tl.min(goal, axis=1) > -0.01)", ""),
        "void distributions": ("bad = v & (fine == 0)", "bad = (fine == 0)"),
        "a tolerance of 0": ("(fine == 0) & (tolerance > 0)", "(fine == 0)"),
        "a NaN unseen": ("(fine == 0) &", "(tl.abs(tl.sum(goal, axis=1) - 1.0) >= tolerance) &"),
    },
    ("geometry", check_soft_softmax): {
        "values under void": (
            "q = tl.load(at, mask=real, other=0.0)",
            "q = tl.load(at, mask=(c < C)[None, :], other=0.0)",
        ),
    },
    ("target", check_tile_class): {
        "tile at the lower border": ("(y0 + BLOCK_H + reach > H)", "(y0 + BLOCK_H > H)"),
        "tile without surroundings": ("(i < REACH + BLOCK_H + reach)", "(i < REACH + BLOCK_H)"),
        "tile without its corner": ("(j >= REACH - reach)", "(j >= REACH)"),
    },
    ("target", check_prepare): {
        "weights transposed": ("(out * C + channel) * TAPS", "(channel * K + out) * TAPS"),
        "taps turned": ("(out * C + channel) * TAPS + tap", "(out * C + channel) * TAPS + TAPS - 1 - tap"),
        "table without void": ("mask=c <= CLASSES, other", "mask=c < CLASSES, other"),
        "table of one tap": ("+ c[:, None]) * TAPS + tap", "+ c[:, None]) * TAPS"),
    },
    ("layers", check_first_layer): {
        "wrong tap": ("shift = (dy * W + dx) * IN", "shift = (dy * W - dx) * IN"),
        "no zero beside the image": (" & (x >= -dx) & (x < W - dx)", ""),
        "no zero above the image": ("(y >= -dy) & (y < H - dy)", "(y < H)"),
        "class outside the image": ("dx), mask=inside, other=C)", "dx), mask=inside, other=0)"),
        "codes swapped": (CODES, SWAPPED),
        "row of the table": ("table + known * OUT", "table + (known - 1) * OUT"),
        "void distance": ("seen = tl.where(v[:, None], seen, 0.0)", "seen = seen * 1.0"),
        "no bias": ("total += tl.load(bias + o)[None, :]", "total += 0.0"),
        "prediction without target": ("prediction = target + d", "prediction = d"),
    },
    ("layers", check_hidden_layer): {
        "features of a known tile": ("near = inside & (known < 0)", "near = inside"),
        "own tile's class": ("+ (x + dx) // BLOCK_W", "+ x // BLOCK_W"),
        "second word of codes": ("at = codes + (plane * WORDS + word) * P", "at = codes + (plane + word) * P"),
    },
    ("layers", check_last_layer): {
        "codes swapped behind the ReLU": (CODES, SWAPPED),
        "distance before the ReLU": ("            seen = difference\n", "            seen = d\n"),
    },
    ("layers", check_layer_bwd): {
        "backward tap": ("row = here + (dy * W + dx)", "row = here + (dx * W + dy)"),
        "backward not turned": ("KSIZE // 2 - tap // KSIZE", "tap // KSIZE - KSIZE // 2"),
        "sign of the seed": ("(above - below)", "(above + below)"),
        "plane of the ReLU": ("on = load_bits(prev_codes, 2,", "on = load_bits(prev_codes, 1,"),
        "second word read": ("tl.where((k < 32)[None, :], words, second)", "words + second * 0"),
        "no ReLU backward": ("tl.where(on != 0, d_a, 0.0)", "d_a"),
    },
    ("logits_grad", check_logits_bwd): {
        "softmax backward": ("(d_p - tl.sum(s * d_p, axis=1)[:, None])", "d_p"),
        "void gradient": ("d_z = tl.where(v[:, None], d_z, 0.0)", "d_z = d_z * 1.0"),
        "unit of the seeds": ("(tl.load(d_semeda) * unit)", "tl.load(d_semeda)"),
        "strides of the gradient": ("x.to(tl.int64) * g_stride_w", "x.to(tl.int64) * z_stride_w"),
        "smoothing": ("+ label_smoothing / C)", "+ label_smoothing)"),
    },
    ("reduction", check_sum): {
        "last partial sum": ("mask=at < tiles", "mask=at < tiles - 1"),
        "a block left out": ("start += BLOCK", "start += 2 * BLOCK"),
        "sum in float32": ("tl.sum(total)", "tl.sum(total.to(tl.float32))"),
    },
    ("reduction", check_finish): {
        "another layer's term": ("sums + 4 + layer", "sums + 3 + layer"),
        "bad labels hidden": ('tl.where(bad > 0, float("nan"), semeda)', "semeda"),
    },
}
FAULTS = {name: Fault(*where, *texts) for where, group in SEEDED.items() for name, texts in group.items()}


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Callable[..., ModuleType]]:
    """(file, text, wrong) -> the kernels as a package of another name, with that change."""
    names = []

    def load(file: str, text: str, wrong: str) -> ModuleType:
        name = f"faulty_{tmp_path.name}"
        folder = tmp_path / name
        folder.mkdir()
        for source in Path(package.__file__ or "").parent.glob("*.py"):
            code = source.read_text(encoding="utf-8")
            if source.stem == file:
                assert code.count(text) == 1, f"{source.name} has {text!r} {code.count(text)} times; adapt this fault"
                code = code.replace(text, wrong)
            (folder / source.name).write_text("" if source.stem == "__init__" else code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        return module

    yield load
    for name in [key for key in sys.modules for own in names if key == own or key.startswith(f"{own}.")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where a fault overflows
@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_seen(name: str, copied: Callable[..., ModuleType]) -> None:
    fault = FAULTS[name]
    assert fault.text != fault.wrong
    faulty = copied(fault.file, fault.text, fault.wrong)
    with pytest.raises(AssertionError) as caught:
        fault.check(faulty)
    assert "adapt this fault" not in str(caught.value)


def test_the_copy_alone_is_no_fault(copied: Callable[..., ModuleType]) -> None:
    """Or the tests above would prove nothing."""
    faulty = copied("softmax", "# 2. softmax\n", "# 2.\n")
    for check in (check_softmax, check_first_layer, check_sum):
        check(faulty)


def test_every_kernel_has_a_fault() -> None:
    files = {path.stem for path in Path(package.__file__ or "").parent.glob("*.py")}
    with_kernels = {
        stem for stem in files if "@triton.jit" in (Path(package.__file__ or "").parent / f"{stem}.py").read_text()
    }
    assert with_kernels == {fault.file for fault in FAULTS.values()}
    assert {fault.check for fault in FAULTS.values()} == set(CHECKS)
