"""The fused CPU kernels among threads and processes: the same bits, no hang, no growing memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu_budget import Outcome, loss_and_grad
from helpers import VOID, make_inputs, make_proxy
from torch import Tensor

from semeda_fast.backends import registry as backends
from semeda_fast.backends.native import native_info, native_module

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)
TESTS = Path(__file__).resolve().parent
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that used threads: Linux")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Threads and instruction set are of the process: what a test chose must not stay."""
    module, threads = native_module(), torch.get_num_threads()
    name = module.instruction_set()
    yield
    assert module.use_instruction_set(name)
    torch.set_num_threads(threads)


def run(logits: Tensor, target: Tensor, reduction: str, **proxy: str) -> Outcome:
    return loss_and_grad(
        logits, target, make_proxy(logits.shape[1], **proxy), "cpu", ignore_index=VOID, reduction=reduction
    )


def same(a: Outcome, b: Outcome) -> bool:
    return torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad)


# Chunks of rows; strips of columns that many classes make narrow; strips of a wide image; fewer rows than threads.
SHAPES = [(2, 3, 67, 21), (1, 1024, 3, 420), (1, 2, 35, 2060), (1, 4, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_threads_change_no_bit(shape: tuple[int, int, int, int], reduction: str) -> None:
    n, c, h, w = shape
    logits, target = make_inputs(n=n, c=c, h=h, w=w, num_labels=min(c, 255))
    torch.set_num_threads(1)
    alone = run(logits, target, reduction)
    assert same(alone, run(logits, target, reduction)), "two runs differ"
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same(alone, run(logits, target, reduction)), f"{threads} threads"


@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("tap", ["pre", "post"])
def test_threads_change_no_bit_on_any_instruction_set(tap: str, distance: str) -> None:
    logits, target = make_inputs(n=1, c=3, h=49, w=37, dtype=torch.bfloat16)
    module = native_module()
    for name in module.build_info()["instruction_sets"]:
        if not module.use_instruction_set(name):
            continue
        torch.set_num_threads(1)
        alone = run(logits, target, "none", tap=tap, distance=distance)
        torch.set_num_threads(3)
        assert same(alone, run(logits, target, "none", tap=tap, distance=distance)), name


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where the system lists them")
def test_several_threads_do_take_part() -> None:
    """Without this, the tests above could compare one thread with itself."""
    if not native_info().build["openmp"]:
        pytest.skip("built without OpenMP")
    counts = []
    inputs = make_inputs(n=1, c=3, h=640, w=9)

    def work() -> None:  # a new thread starts a team of its own
        run(*inputs, "sum")
        before = len(list(Path("/proc/self/task").iterdir()))
        torch.set_num_threads(6)
        run(*inputs, "sum")
        counts.append(len(list(Path("/proc/self/task").iterdir())) - before)

    torch.set_num_threads(1)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert 1 <= counts[0] <= 5


@pytest.mark.parametrize("threads", [1, 2])
def test_two_python_threads_at_once(threads: int) -> None:
    """Each with shapes of its own, growing and shrinking, while the other computes."""
    torch.set_num_threads(threads)
    sizes = {0: [(1, 3, 33, 40), (1, 3, 5, 130), (2, 3, 18, 17)], 1: [(1, 7, 20, 50), (2, 7, 40, 9), (1, 7, 3, 3)]}
    inputs = {k: [make_inputs(n=n, c=c, h=h, w=w, seed=k) for n, c, h, w in shapes] for k, shapes in sizes.items()}
    alone = {k: [run(*pair, "none") for pair in pairs] for k, pairs in inputs.items()}
    start = threading.Barrier(2)
    wrong: list[str] = []

    def work(k: int) -> None:
        try:
            torch.set_num_threads(threads)
            start.wait(timeout=30)
            for repeat in range(25):
                for number, pair in enumerate(inputs[k]):
                    if not same(run(*pair, "none"), alone[k][number]):
                        wrong.append(f"thread {k}, repeat {repeat}, shape {sizes[k][number]}")
        except BaseException as error:  # an exception of a thread would be lost
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(k,)) for k in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def child(code: str, timeout: float = 60) -> str:
    """Run `code` in a Python process of its own, so that a hang or a crash is a failure and nothing more."""
    start = f"import sys; sys.path[:0] = {[str(TESTS), *sys.path]!r}\n" + PREPARE
    try:
        done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs: no end after {timeout} s; output so far: {error.stdout!r}")
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import os, threading, torch
from cpu_budget import loss_and_grad
from helpers import VOID, make_inputs, make_proxy

# Several tasks, but less than torch itself would share among threads: in a forked child it would wait for ever.
logits, target = make_inputs(n=1, c=3, h=37, w=17)

def run(*inputs):
    return loss_and_grad(*(inputs or (logits, target)), make_proxy(3), "cpu", ignore_index=VOID, reduction="none")

def same(a, b):
    return torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""


@needs_fork
def test_a_forked_child_computes_the_same() -> None:
    """After the parent's team of threads, which does not exist in the child; also in a child of the child."""
    code = """
torch.set_num_threads(3)
expected = run()

def fork(prepare, depth):
    pid = os.fork()
    if pid == 0:
        prepare()
        code = 1
        try:
            code = 0 if all(same(run(), expected) for _ in range(3)) and (depth == 0 or fork(prepare, depth - 1)) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

ways = {
    "": lambda: None,
    "torch.set_num_threads(1)": lambda: torch.set_num_threads(1),
    "torch.set_num_threads(2)": lambda: torch.set_num_threads(2),
}
for name, prepare in ways.items():
    print(name, flush=True)  # a hang's output names it
    assert fork(prepare, 1), "the child computed something else"
    assert same(run(), expected), "the parent after the fork"
print("same")
"""
    assert child(code).splitlines()[-1] == "same"


@needs_fork
def test_workers_of_a_data_loader() -> None:
    """Forked, one thread each, two at once."""
    code = """
from torch.utils.data import DataLoader, Dataset

class Losses(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, number):
        result = run()
        return result.loss, result.grad, torch.get_num_threads()

torch.set_num_threads(3)
expected = run()
loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
items = list(loader)
assert len(items) == 6
for loss, grad, threads in items:
    assert threads == 1
    assert torch.equal(loss, expected.loss) and torch.equal(grad, expected.grad)
print("same")
"""
    assert child(code) == "same\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc: Linux")
def test_memory_does_not_grow_from_call_to_call() -> None:
    """200 calls of changing shapes, which need scratch of up to megabytes, on one thread and then on two."""
    code = """
shapes = [(1, 17, 500), (2, 9, 200), (1, 3, 900), (1, 20, 64)]
inputs = [make_inputs(n=n, c=3, h=h, w=w) for n, h, w in shapes]
for threads in (1, 2):
    torch.set_num_threads(threads)
    for pair in inputs * 5:
        run(*pair)
    before = resident()
    for number in range(200):
        run(*inputs[number % 4])
    print(resident() - before)
"""
    grown = [int(line) for line in child(code).splitlines()]
    assert len(grown) == 2
    assert max(grown) < 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc: Linux")
def test_a_thread_that_ends_gives_its_scratch_back() -> None:
    code = """
torch.set_num_threads(1)
pair = make_inputs(n=1, c=3, h=16, w=900)

def work():
    run(*pair)

def threads(count):
    for _ in range(count):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()

threads(10)
before = resident()
threads(60)
print(resident() - before)
"""
    assert int(child(code)) < 16 << 20
