"""train_proxy: it learns, it is reproducible, in one process and in several."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from training_fixtures import TINY, Items, same, scenes, weights, write_folder

import semeda_fast
from semeda_fast import EdgeProxy, train_proxy
from semeda_fast.proxy import training
from semeda_fast.proxy.crops import VOID, Crops
from semeda_fast.proxy.quality import edge_quality, measure_scales
from semeda_fast.proxy.training import perturbed

# --- learning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> EdgeProxy:
    return train_proxy(scenes(24), 4, steps=60, batch_size=8, crop_size=32, progress=False)


def test_it_learns_to_find_edges(trained: EdgeProxy) -> None:
    unseen = scenes(8, seed=99)
    untrained = edge_quality(EdgeProxy(4), unseen)
    quality = edge_quality(trained, unseen)
    assert quality["edge_f1"] > 0.9 > 0.5 > untrained["edge_f1"]
    assert trained.quality["edge_f1"] > 0.9


def test_the_result_is_a_whole_proxy_that_survives_a_file(trained: EdgeProxy, tmp_path: Path) -> None:
    assert isinstance(trained, EdgeProxy)
    assert (trained.num_classes, trained.widths, trained.edge_classes) == (4, (16, 32), 2)
    assert all(not tensor.requires_grad and tensor.device.type == "cpu" for tensor in weights(trained))
    assert list(trained.parameters()) == []
    assert set(trained.scales) == {"l1", "l2", "smooth_l1"}
    assert trained.quality["held_out"] is True
    assert trained.quality["masks"] == 3  # a tenth of 24, rounded up
    provenance = trained.provenance
    expected = {
        "trained": True,
        "masks": "tensor [24, 40, 40]",
        "mask_count": 21,
        "edge_radius": 1,
        "void": "mask",
        "steps": 60,
        "batch_size": 8,
        "crop_size": 32,
        "seed": 0,
        "torch": torch.__version__,
    }
    assert {name: provenance[name] for name in expected} == expected
    assert provenance["temperature"] == pytest.approx(1 / math.log(27))
    assert provenance["seconds"] > 0
    trained.save(tmp_path / "a.safetensors")
    loaded = EdgeProxy.load(tmp_path / "a.safetensors")
    assert same(loaded, trained)
    assert loaded.provenance == provenance


def test_every_option_of_the_network_arrives() -> None:
    proxy = train_proxy(
        scenes(4),
        4,
        tap="post",
        distance="l2",
        layer_weights=(0, 1),
        kernel_size=5,
        radius=2,
        **{**TINY, "widths": (3,)},
    )
    assert [tuple(weight.shape) for weight in proxy.weights] == [(3, 4, 5, 5), (2, 3, 5, 5)]
    assert (proxy.tap, proxy.distance, proxy.layer_weights) == ("post", "l2", (0.0, 1.0))
    assert proxy.provenance["edge_radius"] == 2


def test_the_radius_decides_what_is_learnt_and_measured() -> None:
    val = scenes(3, seed=5)
    thin, thick = (train_proxy(scenes(6), 4, val_masks=val, radius=radius, **TINY) for radius in (1, 3))
    assert not torch.equal(thin.weights[0], thick.weights[0])
    assert thick.quality == {**edge_quality(thick, val, radius=3), "held_out": True}
    assert thick.quality["edge_share"] > 1.5 * thin.quality["edge_share"]


def test_with_columns_any_column_stands_for_any_class() -> None:
    options = {**TINY, "widths": (16, 32), "crop_size": 32, "batch_size": 8, "steps": 150, "columns": 12}
    proxy = train_proxy(scenes(24, num_classes=3), 3, val_masks=scenes(3, seed=7), **options)
    assert proxy.num_classes == 12
    unseen = scenes(8, num_classes=3, seed=99)
    for names in ([0, 1, 2], [11, 5, 8], [3, 10, 4]):
        renamed = torch.tensor(names)[unseen]
        assert edge_quality(proxy, renamed)["edge_f1"] > 0.85
    assert edge_quality(proxy.slice_classes(3), unseen)["edge_f1"] > 0.85


def test_columns_leave_the_meaning_of_the_other_options_alone() -> None:
    masks, val = scenes(4, num_classes=3), scenes(2, num_classes=9, seed=7)  # val_masks may use all columns
    proxy = train_proxy(masks, 3, columns=9, val_masks=val, **TINY)
    assert proxy.quality == {**edge_quality(proxy, val), "held_out": True}
    assert proxy.scales == measure_scales(proxy, val)
    assert same(proxy, train_proxy(masks, 3, columns=9, val_masks=val, **TINY))
    start = EdgeProxy(9, TINY["widths"])
    moved = (proxy.weights[0] - start.weights[0]).abs().amax(dim=(0, 2, 3))
    assert int((moved > 0).sum()) > 3  # columns beyond the first three were dealt, too
    with pytest.raises(ValueError, match="columns must be at least num_classes=3, got 2"):
        train_proxy(masks, 3, columns=2, **TINY)
    with pytest.raises(ValueError, match="from 0 to 8, expected 0 to 2"):
        train_proxy(val, 3, columns=9, val_fraction=0, **TINY)


# --- reproducibility --------------------------------------------------------------------------------------


def test_a_seed_decides_everything_bit_for_bit() -> None:
    masks = scenes(6)
    first = train_proxy(masks, 4, seed=1, **TINY)
    torch.manual_seed(12345)  # the global state must not matter
    again, other = train_proxy(masks, 4, seed=1, **TINY), train_proxy(masks, 4, seed=2, **TINY)
    assert same(first, again)
    assert all(not torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def test_a_crop_depends_on_the_seed_and_its_number_alone() -> None:
    masks = scenes(5, 20).to(torch.int16)
    crops, other = (Crops(masks, 50, 8, seed, fill_void=False) for seed in (1, 2))  # type: ignore[arg-type]
    forwards = [crops[number] for number in range(50)]
    backwards = [crops[number] for number in reversed(range(50))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert sum(not torch.equal(a, other[number]) for number, a in enumerate(forwards)) > 25
    assert len({tuple(crop.flatten().tolist()) for crop in forwards}) > 25
    with pytest.raises(IndexError):
        crops[50]


def test_crops_come_from_every_place_in_every_mirror_image() -> None:
    mask = torch.arange(5 * 4, dtype=torch.int16).reshape(1, 5, 4)
    crops = Crops(mask, 600, 3, 0, fill_void=False)  # type: ignore[arg-type]
    found = {tuple(crop.flatten().tolist()) for crop in (crops[number] for number in range(600))}
    expected = set()
    for top, left in itertools.product(range(3), range(2)):
        part = mask[0, top : top + 3, left : left + 3]
        for axes in ((), (0,), (1,), (0, 1)):
            expected.add(tuple(part.flip(axes).flatten().tolist()))
    assert found == expected


def test_a_crop_larger_than_its_mask_is_surrounded_by_void() -> None:
    mask = torch.ones(1, 3, 2, dtype=torch.int16)
    crop = Crops(mask, 1, 4, 0, fill_void=False)[0]  # type: ignore[arg-type]
    assert crop.dtype == torch.int64
    assert crop.tolist() == [[1, 1, VOID, VOID]] * 3 + [[VOID] * 4]


def test_the_seed_decides_the_noise_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(labels: Tensor, num_classes: int, noise: float, heat: float, generator: torch.Generator) -> Tensor:
        seen.append(generator.initial_seed())
        return perturbed(labels, num_classes, noise, heat, generator)

    monkeypatch.setattr(training, "perturbed", spy)
    for seed in (1, 2, 1):
        assert train_proxy(scenes(3), 4, seed=seed, **{**TINY, "steps": 1}).provenance["seed"] == seed
    assert seen[0] == seen[2] != seen[1]


def test_the_global_random_states_are_left_alone() -> None:
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    train_proxy(scenes(4), 4, **TINY)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # type: ignore[index] # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_tensor_folder_dataset_and_array_agree(tmp_path: Path) -> None:
    masks = scenes(6)
    masks[:, 3:6, 7:20] = 255
    tensor = train_proxy(masks, 4, ignore_index=255, **TINY)
    sources: dict[str, Any] = {
        "a folder": write_folder(tmp_path / "masks", masks),
        "a folder's name": str(tmp_path / "masks"),
        "a Dataset": Items(list(masks)),
        "a Dataset of arrays": Items([mask.numpy().astype(np.uint8) for mask in masks]),
        "an array": masks.numpy(),
        "uint8": masks.to(torch.uint8),
        "int16": masks.to(torch.int16),
        "uint16": masks.to(torch.uint16),
        "uint16, an array": masks.numpy().astype(np.uint16),
        "uint32": masks.to(torch.uint32),
    }
    for name, source in sources.items():
        assert same(train_proxy(source, 4, ignore_index=255, **TINY), tensor), name


def test_the_provenance_names_a_folder_without_its_full_path(tmp_path: Path) -> None:
    proxy = train_proxy(write_folder(tmp_path / "masks", scenes(3)), 4, **TINY)
    assert proxy.provenance["masks"] == f"folder {tmp_path.name}/masks"
    assert proxy.provenance["mask_count"] == 2


def test_masks_of_several_sizes_and_smaller_than_a_crop() -> None:
    masks = [scenes(1, size)[0][:, : size - 3] for size in (12, 15, 30)]
    proxy = train_proxy(Items(masks), 4, val_fraction=0, **{**TINY, "crop_size": 20})
    assert proxy.quality["pixels"] == sum(mask.numel() for mask in masks)
    assert all(tensor.isfinite().all() for tensor in weights(proxy))


def test_the_masks_are_not_modified() -> None:
    masks = scenes(4)
    masks[:, :5] = 255
    kept = masks.clone()
    train_proxy(masks, 4, ignore_index=255, void="nearest", **TINY)
    assert torch.equal(masks, kept)


def test_an_accelerator_of_the_caller_gives_the_same_and_keeps_nothing(tmp_path: Path) -> None:
    masks = scenes(4)
    accelerator = Accelerator(cpu=True)
    assert same(train_proxy(masks, 4, accelerator=accelerator, **TINY), train_proxy(masks, 4, **TINY))
    accelerator.save_state(str(tmp_path))  # must not store the proxy's network among the caller's
    left = [name for name in os.listdir(tmp_path) if not name.startswith("random_states")]
    assert left == []


# --- masks held out ----------------------------------------------------------------------------------------


def test_val_masks_are_what_is_measured_and_all_masks_are_trained_on() -> None:
    masks, val = scenes(5), scenes(3, 30, seed=7)
    val[:, 10:14] = 255
    proxy = train_proxy(masks, 4, ignore_index=255, val_masks=val, **TINY)
    assert proxy.quality == {**edge_quality(proxy, val, ignore_index=255), "held_out": True}
    assert proxy.scales == measure_scales(proxy, val, ignore_index=255)
    assert proxy.provenance["mask_count"] == 5
    other = train_proxy(masks, 4, ignore_index=255, val_masks=scenes(2, seed=8), **TINY)
    assert all(torch.equal(a, b) for a, b in zip(weights(proxy), weights(other), strict=True))
    assert other.quality != proxy.quality


def test_val_masks_may_be_a_folder_while_masks_are_a_tensor(tmp_path: Path) -> None:
    val = scenes(2, seed=7)
    folder = write_folder(tmp_path / "val", val)
    assert same(train_proxy(scenes(4), 4, val_masks=folder, **TINY), train_proxy(scenes(4), 4, val_masks=val, **TINY))


def test_masks_held_out_are_not_trained_on() -> None:
    masks = scenes(4)
    proxy = train_proxy(masks, 4, val_fraction=0.5, **TINY)
    held = [
        pair
        for pair in itertools.combinations(range(4), 2)
        if proxy.quality == {**edge_quality(proxy, masks[list(pair)]), "held_out": True}
    ]
    assert len(held) == 1
    assert proxy.provenance["mask_count"] == 2
    for number in range(4):
        changed = masks.clone()
        changed[number] = scenes(1, seed=50 + number)[0]
        again = train_proxy(changed, 4, val_fraction=0.5, **TINY)
        assert torch.equal(again.weights[0], proxy.weights[0]) == (number in held[0])


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(4, 0.0, 0), (1, 0.1, 0), (4, 0.1, 1), (5, 0.5, 3), (3, 0.99, 2), (21, 0.1, 3)],
)
def test_the_number_of_masks_held_out(count: int, fraction: float, held: int) -> None:
    proxy = train_proxy(scenes(count, 16), 4, val_fraction=fraction, **{**TINY, "steps": 1})
    assert proxy.quality["held_out"] is (held > 0)
    assert proxy.quality["masks"] == (held or count)
    assert proxy.provenance["mask_count"] == count - held


# --- what is printed --------------------------------------------------------------------------------------


def test_without_progress_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    train_proxy(scenes(3), 4, **TINY)
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_beside_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    train_proxy(scenes(3), 4, **{**TINY, "progress": True})
    out, err = capfd.readouterr()
    assert out == ""
    assert "train proxy" in err
    assert "5/5" in err
    assert "loss=" in err


# --- several processes ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from semeda_fast import train_proxy
from semeda_fast.proxy import training

seeds = []


def spy(*arguments, original=training.perturbed):
    seeds.append(arguments[-1].initial_seed())
    return original(*arguments)


training.perturbed = spy
masks = torch.load(sys.argv[1])
options = json.loads(sys.argv[2])
proxy = train_proxy(masks, 4, noise=0.0, **options)
noisy = train_proxy(masks, 4, **options)
dealt = train_proxy(masks, 4, noise=0.0, columns=7, **options)
try:
    train_proxy(masks, 4, **{**options, "batch_size": 3})
except ValueError as error:
    message = str(error)
torch.save(
    {
        "world": dist.get_world_size(),
        "message": message,
        "seeds": seeds,
        "weights": proxy.weights + proxy.biases,
        "noisy": noisy.weights + noisy.biases,
        "dealt": dealt.weights + dealt.biases,
        "quality": proxy.quality,
        "scales": proxy.scales,
    },
    f"{sys.argv[3]}/{dist.get_rank()}.pt",
)
"""


def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    masks = scenes(6)
    torch.save(masks, tmp_path / "masks.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    options = {**TINY, "crop_size": 20, "steps": 8}
    package = str(Path(semeda_fast.__file__).resolve().parents[1])
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    # accelerate's --cpu starts one process (more need MPI), so the GPU launcher it is, without a GPU.
    launch += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [
            *launch,
            str(tmp_path / "script.py"),
            str(tmp_path / "masks.pt"),
            json.dumps(options),
            str(tmp_path),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["world"] == second["world"] == 2
    for name in ("weights", "noisy", "dealt"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
    assert (first["quality"], first["scales"]) == (second["quality"], second["scales"])
    assert not set(first["seeds"]) & set(second["seeds"])  # each process draws noise of its own
    assert "batch_size=3 must be a multiple of the 2 processes" in first["message"]
    # Without void each half of a batch weighs the same; without noise nothing but rounding remains.
    for name, columns in (("weights", None), ("dealt", 7)):
        alone = train_proxy(masks, 4, noise=0.0, columns=columns, **options)
        for a, b in zip(first[name], weights(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
