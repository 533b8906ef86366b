"""Proxy files: everything comes back, nothing is executed, and whatever is wrong is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.errors import ProxyFileError
from semeda_fast.proxy import storage
from semeda_fast.proxy.record import ProxyLayer

LAYERS = [ProxyLayer(4, 6, 5, 1, 2), ProxyLayer(6, 5, 3, 2), ProxyLayer(5, 3, 1, 1, 1, -2)]


def make_proxy(**options: Any) -> EdgeProxy:
    """A proxy that differs from every default."""
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn((x.out_channels, x.in_channels, x.kernel_size, x.kernel_size), generator=generator) for x in LAYERS
    ]
    biases = [torch.randn(x.out_channels, generator=generator) for x in LAYERS]
    biases[0][:3] = torch.tensor([0.1, 1e-42, -3e38])  # rounding, a denormal number, a large one
    description: dict[str, Any] = {
        "tap": "post",
        "distance": "smooth_l1",
        "layer_weights": (0.1, 0.0, 1 / 3),
        "scales": {"l1": (0.1, 2 / 3, 1e-7), "smooth_l1": (3.0, 4.0, 5e11)},
        "provenance": {
            "trained": True,
            "masks": "folder train/Straße",
            "steps": 600,
            "lr": 0.01,
            "nested": {"a": [1, None]},
        },
        "quality": {"edge_f1": 0.123456789012345, "masks": 3, "held_out": False},
    }
    return EdgeProxy.from_tensors(LAYERS, weights, biases, **{**description, **options})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "proxy.safetensors"
    make_proxy().save(path)
    return path


def rewrite(
    path: Path,
    *,
    description: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    tensors: dict[str, Tensor] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The file with changed contents; `without` names metadata keys, fields or tensors to drop."""
    with safe_open(path, framework="pt") as opened:
        meta = dict(opened.metadata())
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    fields = {**json.loads(meta["proxy"]), **(description or {})}
    meta["proxy"] = json.dumps({name: value for name, value in fields.items() if name not in without})
    meta = {name: value for name, value in {**meta, **(metadata or {})}.items() if name not in without}
    stored = {name: value for name, value in {**stored, **(tensors or {})}.items() if name not in without}
    save_file(stored, path, meta)
    return path


def assert_refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(ProxyFileError, match=message) as caught:
        EdgeProxy.load(path)
    assert str(path) in str(caught.value)  # names the file


# --- round trip -------------------------------------------------------------------------------------------


def test_everything_comes_back(saved: Path) -> None:
    proxy, loaded = make_proxy(), EdgeProxy.load(saved)
    assert loaded.layers == proxy.layers
    for name in (
        "tap",
        "distance",
        "layer_weights",
        "scales",
        "provenance",
        "quality",
        "num_classes",
        "widths",
    ):
        assert getattr(loaded, name) == getattr(proxy, name), name
    assert isinstance(loaded.layer_weights, tuple)
    assert isinstance(loaded.scales["l1"], tuple)
    for ours, theirs in zip(loaded.weights + loaded.biases, proxy.weights + proxy.biases, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    x = torch.rand(1, 4, 16, 16)
    for a, b in zip(loaded.features(x), proxy.features(x), strict=True):
        assert torch.equal(a, b)


def test_an_untrained_default_proxy_comes_back(tmp_path: Path) -> None:
    EdgeProxy(7, (4,)).save(tmp_path / "a.safetensors")
    loaded = EdgeProxy.load(tmp_path / "a.safetensors")
    assert loaded.layers == EdgeProxy(7, (4,)).layers
    assert (loaded.scales, loaded.quality, loaded.provenance) == ({}, {}, {"trained": False})


def test_sliced_and_half_precision_proxies_are_stored_as_they_are(tmp_path: Path) -> None:
    sliced = make_proxy().slice_classes(2).half()
    sliced.save(tmp_path / "a.safetensors")
    loaded = EdgeProxy.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.weights[0], make_proxy().weights[0][:, :2])
    assert loaded.provenance["sliced_from_classes"] == 4


def test_strings_and_paths_are_taken_and_the_loss_takes_them_too(saved: Path) -> None:
    assert EdgeProxy.load(str(saved)).layers == EdgeProxy.load(saved).layers
    for path in (saved, str(saved)):
        assert SemedaLoss(path).proxy.layer_weights == (0.1, 0.0, 1 / 3)


def test_any_safetensors_reader_can_read_the_weights_and_the_metadata(saved: Path) -> None:
    with safe_open(saved, framework="np") as opened:
        assert sorted(opened.keys()) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]
        assert opened.get_tensor("0.weight").shape == (6, 4, 5, 5)
        metadata = opened.metadata()
    assert (metadata["format"], metadata["version"]) == (storage.FORMAT, "1")
    assert json.loads(metadata["proxy"])["tap"] == "post"


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 1280, 1288])
def test_a_header_of_any_length_is_read(tmp_path: Path, length: int) -> None:
    # The file begins with its header's length: 0x0280 = 640 is b"\x80\x02", as pickles begin too.
    proxy = EdgeProxy(2, ())
    proxy.provenance = {"x": ""}
    path = tmp_path / "proxy.safetensors"
    proxy.save(path)
    spare = length - int.from_bytes(path.read_bytes()[:8], "little")
    assert spare >= 0
    proxy.provenance = {"x": "a" * spare}
    proxy.save(path, overwrite=True)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert EdgeProxy.load(path).provenance == proxy.provenance


# --- what is refused when reading -------------------------------------------------------------------------


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path)) + ".*semeda-fast train-proxy"):
        EdgeProxy.load(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is a folder; expected a proxy file")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 9, 50, 500, -4000, -100, -4, -1])
def test_a_truncated_file_is_refused(saved: Path, length: int) -> None:
    whole = saved.read_bytes()
    cut = whole[:length]
    assert len(cut) < len(whole)
    saved.write_bytes(cut)
    assert_refused(saved, "it may be truncated: copy or train it again")


def test_bytes_behind_the_end_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 8)
    assert_refused(saved)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "proxy.safetensors"
    path.write_bytes(bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(seed)).tolist()))
    assert_refused(path)


@pytest.mark.parametrize("text", ["", "not a proxy\n", "{}", "\0" * 100, "<html></html>" * 50])
def test_text_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "proxy.safetensors"
    path.write_text(text)
    assert_refused(path)


def test_a_header_that_claims_the_whole_address_space_is_refused(saved: Path) -> None:
    saved.write_bytes(b"\xff" * 8 + saved.read_bytes()[8:])
    assert_refused(saved)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


PICKLES = ["torch.save, zip", "torch.save, legacy", *range(pickle.HIGHEST_PROTOCOL + 1)]


def write_pickle(kind: str | int, value: object, path: Path) -> None:
    """In one of torch's formats, or in a protocol of pickle."""
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(value, kind))
    else:
        torch.save(value, path, _use_new_zipfile_serialization="zip" in kind)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, kind: str | int) -> None:
    witness, path = tmp_path / "witness", tmp_path / "proxy.safetensors"
    write_pickle(kind, {"weight": torch.zeros(3), "payload": Payload(witness)}, path)
    assert_refused(path)
    with pytest.raises(ProxyFileError):
        SemedaLoss(path)
    assert not witness.exists()
    # The payload is alive: it does run for whoever unpickles the file.
    stream = io.BytesIO(path.read_bytes())
    if isinstance(kind, int):
        pickle.load(stream)
    else:
        torch.load(stream, weights_only=False)
    assert witness.exists()


@pytest.mark.parametrize("kind", ["torch.save, zip", "torch.save, legacy", 2, 4])
def test_the_text_for_a_pickle_says_why_and_what_to_do(tmp_path: Path, kind: str | int) -> None:
    path = tmp_path / "proxy.safetensors"
    write_pickle(kind, EdgeProxy(2, (3,)), path)
    assert_refused(path, r"pickle .* can run code .* refused; .*EdgeProxy\.from_sequential")


def test_safetensors_of_another_kind_are_refused(tmp_path: Path, saved: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(1)}, other)
    assert_refused(other, r"another kind \(format None, expected 'semeda_fast.edge_proxy'\)")
    save_file({"0.weight": torch.zeros(1)}, other, {"format": "pt"})
    assert_refused(other, "another kind .*'pt'")
    assert_refused(rewrite(saved, without=("format",)), "another kind")


@pytest.mark.parametrize("version", ["2", "999", "0", "", "one"])
def test_another_version_is_refused_with_both_numbers(saved: Path, version: str) -> None:
    rewrite(saved, metadata={"version": version})
    assert_refused(saved, f"proxy format version {version}, this package reads 1; install the version")


@pytest.mark.parametrize("name", ["version", "proxy"])
def test_a_missing_metadata_key_is_refused(saved: Path, name: str) -> None:
    assert_refused(rewrite(saved, without=(name,)))


@pytest.mark.parametrize("name", ["layers", "tap", "distance", "layer_weights", "scales", "provenance", "quality"])
def test_a_missing_field_is_refused(saved: Path, name: str) -> None:
    assert_refused(rewrite(saved, without=(name,)), f"describes no valid proxy: KeyError.*{name}")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"pre"', "\u0000", "[" * 100_000], ids=lambda text: repr(text[:3])
)
def test_a_description_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    assert_refused(rewrite(saved, metadata={"proxy": text}), "describes no valid proxy")


def layers_with(number: int, **change: Any) -> list[dict[str, Any]]:
    description = [dict(vars(layer)) for layer in LAYERS]
    description[number].update(change)
    return description


@pytest.mark.parametrize(
    "description",
    [
        {"tap": "before"},
        {"tap": None},
        {"distance": "l3"},
        {"layer_weights": [1, 1]},
        {"layer_weights": [1, 1, -1]},
        {"layer_weights": [1, 1, float("nan")]},
        {"layer_weights": "abc"},
        {"layer_weights": 3},
        {"layer_weights": [1, 1, 10**400]},
        {"scales": {"l1": [1, 1]}},
        {"scales": {"l1": [1, 1, 0]}},
        {"scales": {"l1": [1, 1, float("inf")]}},
        {"scales": {"l9": [1, 1, 1]}},
        {"scales": [1.0, 1.0, 1.0]},
        {"scales": "abc"},
        {"provenance": 5},
        {"quality": "good"},
        {"layers": []},
        {"layers": None},
        {"layers": layers_with(0)[:2]},
        {"layers": layers_with(0, kernel_size=3)},
        {"layers": layers_with(0, kernel_size=4)},
        {"layers": layers_with(0, in_channels=5)},
        {"layers": layers_with(0, out_channels=7)},
        {"layers": layers_with(0, in_channels="4")},
        {"layers": layers_with(1, stride=0)},
        {"layers": layers_with(1, stride=1.5)},
        {"layers": layers_with(1, dilation=None)},
        {"layers": layers_with(2, pool=1)},
        {"layers": layers_with(2, pool=2.5)},
        {"layers": layers_with(2, groups=2)},
    ],
    ids=lambda description: json.dumps(description)[:60],
)
def test_an_inconsistent_description_is_refused(saved: Path, description: dict[str, Any]) -> None:
    assert_refused(rewrite(saved, description=description), "describes no valid proxy")


@pytest.mark.parametrize(
    "tensors",
    [
        {"0.weight": torch.zeros(6, 4, 3, 3)},
        {"1.weight": torch.zeros(6, 5, 3, 3)},  # in and out exchanged
        {"1.bias": torch.zeros(6)},
        {"2.bias": torch.zeros(())},
        {"3.weight": torch.zeros(3, 3, 1, 1), "3.bias": torch.zeros(3)},
        {"extra": torch.zeros(1)},
    ],
    ids=lambda tensors: ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items()),
)
def test_tensors_that_do_not_fit_the_layers_are_refused(saved: Path, tensors: dict[str, Tensor]) -> None:
    assert_refused(rewrite(saved, tensors=tensors), "describes no valid proxy")


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_missing_tensor_is_refused(saved: Path, name: str) -> None:
    assert_refused(rewrite(saved, without=(name,)), "expected the tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["1.weight", "2.bias"])
def test_weights_that_are_not_finite_are_refused(saved: Path, name: str, value: float) -> None:
    numbers = (make_proxy().weights[1] if name == "1.weight" else make_proxy().biases[2]).clone()
    numbers.view(-1)[-1] = value
    assert_refused(rewrite(saved, tensors={name: numbers}), f"layer {name[0]} holds weights that are not finite")


def test_float64_weights_that_overflow_float32_are_refused(saved: Path) -> None:
    rewrite(saved, tensors={"2.bias": torch.full((3,), 1e300, dtype=torch.float64)})
    assert_refused(saved, "not finite")


def test_float8_weights_are_read_or_refused_but_never_a_raw_error(saved: Path) -> None:
    rewrite(saved, tensors={"2.bias": torch.ones(3).to(torch.float8_e4m3fn)})
    with contextlib.suppress(ProxyFileError):
        assert torch.equal(EdgeProxy.load(saved).biases[2], torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_point_dtypes_are_read_as_float32(saved: Path, dtype: torch.dtype) -> None:
    stored = make_proxy().weights[1].to(dtype)
    loaded = EdgeProxy.load(rewrite(saved, tensors={"1.weight": stored}))
    assert loaded.weights[1].dtype == torch.float32
    assert torch.equal(loaded.weights[1], stored.float())


def test_an_unreadable_file_is_an_os_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(saved))

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(storage, "safe_open", denied)
    with pytest.raises((PermissionError, ProxyFileError), match=r"proxy\.safetensors"):
        EdgeProxy.load(saved)


# --- what is refused when writing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["proxy.pt", "proxy", "proxy.safetensors.bak", ".safetensors"])
def test_another_suffix_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProxyFileError, match=re.escape(name) + r" should end in \.safetensors"):
        make_proxy().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(saved)) + ".*overwrite=True"):
        EdgeProxy(2).save(saved)
    assert saved.read_bytes() == before
    EdgeProxy(2).save(saved, overwrite=True)
    assert EdgeProxy.load(saved).num_classes == 2
    assert os.listdir(saved.parent) == [saved.name]


def test_a_loaded_proxy_may_overwrite_its_own_file(saved: Path) -> None:
    loaded = EdgeProxy.load(saved)
    loaded.provenance["note"] = "again"
    loaded.save(saved, overwrite=True)
    again = EdgeProxy.load(saved)
    assert again.provenance["note"] == "again"
    assert torch.equal(again.weights[0], make_proxy().weights[0])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no")) + " does not exist"):
        make_proxy().save(tmp_path / "no" / "proxy.safetensors")


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        make_proxy().save(tmp_path / "proxy.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_crash_midway_leaves_the_old_file_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = saved.read_bytes()

    def crash(tensors: object, path: Path, metadata: object) -> NoReturn:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(storage, "save_file", crash)
    with pytest.raises(type(error)):
        EdgeProxy(2).save(saved, overwrite=True)
    with pytest.raises(type(error)):
        EdgeProxy(2).save(saved.parent / "new.safetensors")
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


def test_provenance_that_json_cannot_hold_is_refused_before_anything_is_written(saved: Path) -> None:
    before = saved.read_bytes()
    proxy = make_proxy(provenance={"masks": Path("a")})
    with pytest.raises((TypeError, ValueError), match="JSON"):
        proxy.save(saved, overwrite=True)
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before
