"""What the script around has set - default dtype, autocast, inference mode, Accelerate's state - changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import Case
from helpers import VOID, make_inputs, value_and_grad
from torch import Tensor, nn
from training_fixtures import TINY, same, scenes

import semeda_fast
from semeda_fast import EdgeProxy, SemedaLoss, train_proxy
from semeda_fast.inspection import inspect_mask

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets another default dtype when called; it is put back after the test."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


# ----------------------------------------------------------------------------------------------------
# torch.set_default_dtype


def test_the_default_dtype_decides_nothing_in_the_loss(case: Case, default_dtype: Callable[[], None]) -> None:
    logits, target = make_inputs(device=case.device)
    options: dict[str, Any] = {
        "num_classes": 5, "ignore_index": VOID, "weight": [1.0, 2, 1, 1, 3], "label_smoothing": 0.1,
        "backend": case.backend,
    }  # fmt: skip
    expected = value_and_grad(SemedaLoss(**options).to(case.device), logits, target)
    default_dtype()
    criterion = SemedaLoss(**options).to(case.device)
    found = value_and_grad(criterion, logits, target)
    assert {buffer.dtype for buffer in criterion.buffers()} == {torch.float32}
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    parts = criterion(logits, target, return_components=True)
    assert {parts.loss.dtype, parts.ce.dtype, parts.semeda.dtype, parts.per_layer.dtype} == {torch.float32}
    criterion.warmup((1, 5, 16, 16))


def test_the_default_dtype_decides_nothing_in_a_proxy(default_dtype: Callable[[], None]) -> None:
    masks = scenes(4)
    logits = 3 * torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    expected = train_proxy(masks, 4, **TINY), EdgeProxy(4, seed=3)
    seen = inspect_mask(masks[0].numpy(), EdgeProxy.bundled(4))
    network = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    imported = EdgeProxy.from_sequential(network)
    default_dtype()
    found = train_proxy(masks, 4, **TINY), EdgeProxy(4, seed=3)
    for a, b in zip(expected, found, strict=True):
        assert same(a, b)
        assert {buffer.dtype for buffer in b.buffers()} == {torch.float32}
    again = inspect_mask(masks[0].numpy(), EdgeProxy.bundled(4))
    assert again.edge_f1 == seen.edge_f1
    assert again.mean_semeda == seen.mean_semeda
    assert same(EdgeProxy.from_sequential(network), imported)
    assert logits.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------
# Contexts of torch

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_decides_nothing_in_train_proxy(name: str) -> None:
    masks = scenes(4)
    expected = train_proxy(masks, 4, **TINY)
    with CONTEXTS[name]():
        found = train_proxy(masks, 4, **TINY)
        assert same(found, expected)
    criterion = SemedaLoss(found)
    _, gradient = value_and_grad(criterion, torch.randn(1, 4, 9, 9), masks[:1, :9, :9])
    assert gradient.any()


# ----------------------------------------------------------------------------------------------------
# Accelerate


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """As in a script that has not used Accelerate yet; it keeps its state for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_an_accelerator_may_follow(fresh_accelerate: None) -> None:
    expected = train_proxy(scenes(4), 4, **TINY)
    assert not PartialState._shared_state
    assert not AcceleratorState._shared_state
    assert not GradientState._shared_state
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.state.distributed_type.value == "NO"
    assert same(train_proxy(scenes(4), 4, **TINY), expected)  # the other order, too


def test_an_accelerator_that_is_in_use(fresh_accelerate: None) -> None:
    """bf16 and accumulation are the job's alone, in the middle of an accumulation, too."""
    expected = train_proxy(scenes(4), 4, **TINY)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)

    def run(interrupted: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(8, 2)
        network, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        weights = []
        for step in range(8):
            with accelerator.accumulate(network):
                accelerator.backward(network(torch.randn(3, 8)).square().mean())
                if interrupted and step in (1, 3):
                    assert same(train_proxy(scenes(4), 4, **TINY), expected)
                    assert same(train_proxy(scenes(4), 4, accelerator=accelerator, **TINY), expected)
                optimizer.step()
                optimizer.zero_grad()
            weights.append(network.weight.detach().clone())
        return weights

    alone, interrupted = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, interrupted, strict=True))
    assert not torch.equal(alone[2], alone[3])
    assert torch.equal(alone[3], alone[6])
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.mixed_precision == "bf16"
    assert len(accelerator._models) == 2


def test_settings_of_the_launcher(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --mixed_precision bf16 --gradient_accumulation_steps 4` says these to each script."""
    expected = train_proxy(scenes(4), 4, **TINY)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert same(train_proxy(scenes(4), 4, **TINY), expected)
    assert Accelerator(cpu=True).mixed_precision == "bf16"


JOB = """
import sys, warnings
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from semeda_fast import train_proxy

warnings.simplefilter("ignore")
folder = sys.argv[1]
masks = torch.load(f"{folder}/masks.pt")
options = dict(widths=(4, 6), steps=5, batch_size=4, crop_size=12, progress=False)


def weights(proxy):
    return proxy.weights + proxy.biases


def all_same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


before = weights(train_proxy(masks, 4, **options))  # joins the processes by itself
assert dist.get_world_size() == 2
assert not PartialState._shared_state and not AcceleratorState._shared_state
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
assert (accelerator.num_processes, accelerator.process_index) == (2, dist.get_rank())


def run(interrupted):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 2)
    network, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(4):
        with accelerator.accumulate(network):
            accelerator.backward(network(torch.randn(3, 8, generator=generator)).square().mean())
            if interrupted and step in (0, 1):
                assert all_same(weights(train_proxy(masks, 4, **options)), before)
                assert all_same(weights(train_proxy(masks, 4, accelerator=accelerator, **options)), before)
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach().clone()


assert torch.equal(run(False), run(True))
assert accelerator.gradient_accumulation_steps == 2 and accelerator.mixed_precision == "bf16"
torch.save(before, f"{folder}/{dist.get_rank()}.pt")
"""


def launched(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in two processes on the CPU, which get `folder` as their argument."""
    (folder / "job.py").write_text(script)
    package = str(Path(semeda_fast.__file__).resolve().parents[1])
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(folder / "job.py"), str(folder)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_before_and_inside_a_job_of_two_processes(tmp_path: Path) -> None:
    torch.save(scenes(4), tmp_path / "masks.pt")
    done = launched(JOB, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ----------------------------------------------------------------------------------------------------
# Accelerator.prepare(criterion)

PREPARED = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from semeda_fast import SemedaLoss

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
criterion = SemedaLoss(num_classes=4, backend="reference")
try:
    accelerator.prepare(criterion)
except RuntimeError as error:
    print(f"raised: {error}")
network, criterion = accelerator.prepare(torch.nn.Conv2d(3, 4, 1)), criterion.to(accelerator.device)  # what works
torch.manual_seed(dist.get_rank())
loss = criterion(network(torch.randn(2, 3, 9, 9)), torch.randint(0, 4, (2, 9, 9)))
accelerator.backward(loss)
gradient = accelerator.unwrap_model(network).weight.grad
both = accelerator.gather(gradient[None])
assert torch.equal(both[0], both[1]) and both.abs().sum() > 0
print("trained")
"""


def test_prepare_of_the_criterion_on_one_process_gives_it_back(fresh_accelerate: None) -> None:
    criterion = SemedaLoss(num_classes=4)
    assert Accelerator(cpu=True).prepare(criterion) is criterion


def test_prepare_of_the_criterion_in_two_processes(tmp_path: Path) -> None:
    """Accelerate wraps modules in DDP there, which refuses one without parameters: what raises, and what works."""
    done = launched(PREPARED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("raised: DistributedDataParallel is not needed when a module doesn't have any") == 2
    assert done.stdout.count("trained") == 2
