"""Nothing is slower without a word: where "auto" takes the reference, one warning at the user's line says why."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import installs
import pytest
import torch
from helpers import VOID, make_inputs, make_proxy
from source_builds import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from semeda_fast import SemedaLoss, backend_info, semeda_loss
from semeda_fast.backends import cpu
from semeda_fast.backends import registry as backends
from semeda_fast.backends import triton as triton_ops
from semeda_fast.errors import BackendUnavailableError
from semeda_fast.spec import LossSpec

SPEC = LossSpec((1.0,) * 3, (1.0,) * 3, (1,) * 3, (1,) * 3, (0,) * 3, ignore_index=VOID)
MISSING = "nobody built it"
needs_native = pytest.mark.skipif("cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not here")
needs_links = pytest.mark.skipif(os.name != "posix", reason="the environment is made of links")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry as it is where nothing is compiled, in a process that has not warned yet."""
    found = dict(backends._registry)
    for name, reason in (("cpu", MISSING), ("cuda", f"{MISSING} with nvcc")):
        absent = functools.partial(str, reason)
        found[name] = dataclasses.replace(found[name], why_unavailable=absent, prepare=None, run=None)
    monkeypatch.setattr(backends, "_registry", found)
    backends._fallbacks.clear()
    backends._changes += 1
    yield
    backends._fallbacks.clear()
    backends._changes += 1


def loss_of(**options: Any) -> SemedaLoss:
    return SemedaLoss(make_proxy(), ignore_index=VOID, **options)


def eager(logits: Tensor, target: Tensor) -> Tensor:
    return loss_of()(logits, target)  # here


def components(logits: Tensor, target: Tensor) -> Tensor:
    return loss_of()(logits, target, return_components=True).loss  # here


def functional(logits: Tensor, target: Tensor) -> Tensor:
    loss = semeda_loss(logits, target, make_proxy(), ignore_index=VOID)  # here
    assert isinstance(loss, Tensor)
    return loss


def no_graph(logits: Tensor, target: Tensor) -> Tensor:
    call = torch.no_grad()(loss_of())
    return call(logits, target)  # here


def compiled(logits: Tensor, target: Tensor) -> Tensor:
    call = torch.compile(loss_of(), fullgraph=True, backend="aot_eager")
    return call(logits, target)  # here


def compiled_whole_step(logits: Tensor, target: Tensor) -> Tensor:
    criterion = loss_of()

    def step(logits: Tensor, target: Tensor) -> Tensor:
        return criterion(2.0 * logits, target)

    return torch.compile(step, fullgraph=True, backend="aot_eager")(logits, target)  # here


def warmed_up(logits: Tensor, target: Tensor) -> Tensor:
    criterion = loss_of()
    criterion.warmup(tuple(logits.shape))  # here
    return criterion(logits, target)


class Network(nn.Module):
    """A network that computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = loss_of()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.criterion(logits, target)  # here


def in_a_network(logits: Tensor, target: Tensor) -> Tensor:
    return Network()(logits, target)


def line_of(function: Callable[..., Any]) -> int:
    """The line that the user would look at, which ends with "# here"."""
    code = (Network.forward if function is in_a_network else function).__code__
    lines = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
    return next(n for n, text in enumerate(lines, 1) if n >= code.co_firstlineno and text.endswith("# here"))


CALLS = (eager, components, functional, no_graph, compiled, compiled_whole_step, warmed_up, in_a_network)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_one_warning_at_the_users_line(unbuilt: None, call: Callable[[Tensor, Tensor], Tensor]) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loss = call(*make_inputs())
        call(*make_inputs())
        loss_of(reduction="none")(*make_inputs(h=5))
    said = [w for w in found if "SemedaLoss" in str(w.message)]
    assert [str(w.message) for w in said] == [f"SemedaLoss runs on the slower reference backend: {MISSING}"]
    assert said[0].category is UserWarning
    assert (Path(said[0].filename), said[0].lineno) == (Path(__file__), line_of(call))
    torch.testing.assert_close(loss, loss_of(backend="reference")(*make_inputs()) if call is not compiled_whole_step
                               else loss_of(backend="reference")(2.0 * make_inputs()[0], make_inputs()[1]))  # fmt: skip
    assert backend_info().fallbacks == (MISSING,)
    assert str(backend_info()).endswith("fell back to reference: cpu is not available")


def test_a_warning_that_is_an_error_names_the_line_and_the_next_call_works(unbuilt: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MISSING):
            eager(*make_inputs())
        eager(*make_inputs())


def test_the_line_is_found_behind_a_users_decorator(unbuilt: None) -> None:
    def timed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def run(*arguments: Tensor) -> Tensor:
            return function(*arguments)  # the user's, and it is here that the library is called

        return run

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        timed(loss_of())(*make_inputs())
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "the user's, and it is here" in lines[found[-1].lineno - 1]


def test_no_word_where_nothing_is_slower(unbuilt: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(backend="reference")(*make_inputs())
        with pytest.raises(BackendUnavailableError, match=f"'cpu' is not available: {MISSING}"):
            loss_of(backend="cpu")
        served = dataclasses.replace(backends.get("reference"), name="other", devices=("cpu",), fused=True)
        backends.register(served)
        loss_of()(*make_inputs())
    assert backend_info().fallbacks == ()


def test_what_the_missing_kernels_would_not_take_is_said_in_their_place(unbuilt: None) -> None:
    logits, target = make_inputs()
    with pytest.warns(
        UserWarning, match="reference backend: the fused CPU kernels compute in float32.*float64"
    ) as found:
        loss_of()(logits.detach().double(), target)
    assert MISSING not in "".join(str(w.message) for w in found)
    with pytest.warns(UserWarning, match=MISSING):
        loss_of()(logits, target)


def choose_for(device: str) -> str:
    """The name of what "auto" takes for tensors of a device that need not be here."""
    with FakeTensorMode():
        logits, target = torch.empty(1, 5, 8, 8, device=device), torch.empty(1, 8, 8, device=device, dtype=torch.long)
    return backends.choose("auto", logits, target, make_proxy().weights, SPEC).name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, whose kernels are not missing")
def test_tensors_of_a_device_that_is_not_here_are_no_reason_to_warn(
    unbuilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in ("cuda", "xpu", "mps"):
            assert choose_for(device) == "reference"
        meta = torch.empty(1, 5, 8, 8, device="meta"), torch.empty(1, 8, 8, device="meta", dtype=torch.long)
        backends.choose("auto", *meta, make_proxy().weights, SPEC)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, whose kernels are not missing")
def test_on_a_gpu_without_triton_the_warning_names_triton(unbuilt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_here", lambda device: True)
    triton = dataclasses.replace(
        backends.get("triton"), why_unavailable=lambda: "Triton is not there", why_unsupported=backends._anything
    )
    backends.register(triton)
    with pytest.warns(UserWarning, match="slower reference backend: Triton is not there") as found:
        assert choose_for("cuda") == "reference"
    assert MISSING not in "".join(str(w.message) for w in found)  # nobody misses the CUDA kernels, which are opt-in


def test_a_device_that_no_kernels_are_for(unbuilt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_here", lambda device: True)
    with pytest.warns(UserWarning, match="slower reference backend: there are no fused kernels for tensors on 'mps'"):
        assert choose_for("mps") == "reference"


def test_no_warning_of_the_package_counts_frames() -> None:
    """`warn.warn_user` is the one place: a count is wrong as soon as somebody wraps a call."""
    found = []
    for path in [*(ROOT / "semeda_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "warnings.warn",
                "warn",
                "warnings.warn_explicit",
            ):
                found.append(path.relative_to(ROOT).as_posix())
    assert found == ["semeda_fast/warn.py"]


# What a build left out


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the compiled module say something else of itself and of the processor."""

    def forget() -> None:
        cpu._missing_vectors.cache_clear()
        cpu._no_openmp.cache_clear()
        backends._slow.clear()

    def say(processor: set[str], **build: Any) -> None:
        info = cpu.native_info()
        flags = {name: name in processor for name in info.cpu}
        changed = dataclasses.replace(info, build=info.build | build, cpu=flags)
        monkeypatch.setattr(cpu, "native_info", lambda: changed)

    forget()
    threads = torch.get_num_threads()
    yield say
    torch.set_num_threads(threads)
    forget()


AVX2 = {"avx2", "fma", "f16c"}


@needs_native
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_build_without_openmp_says_so_once(built: Callable[..., None], name: str) -> None:
    built(set(), openmp=False, compiler="clang 17.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_num_threads(1)  # then there is nothing to lose
        loss_of(backend=name)(*make_inputs())
    torch.set_num_threads(2)
    criterion = loss_of(backend=name)
    with pytest.warns(UserWarning, match=r"'cpu' is slower.*without OpenMP \(clang 17\.0\.0\).*one thread") as found:
        criterion(*make_inputs())  # here
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*make_inputs(h=6))
    assert "compiled without OpenMP" in str(backend_info())
    assert {s.name: s.available for s in backend_info().backends}["cpu"]


@needs_native
@pytest.mark.parametrize(
    ("processor", "sets", "missing"),
    [
        (AVX2, ("portable",), "AVX2"),
        (AVX2 | {"avx512f", "avx512bw", "avx512vl"}, ("avx2", "portable"), "AVX-512"),
        ({"neon"}, ("portable",), "NEON"),
        (AVX2 | {"avx512f"}, ("avx512", "avx2", "portable"), ""),
        (AVX2, ("avx512", "avx2", "portable"), ""),
        ({"avx2"}, ("portable",), ""),  # without FMA the AVX2 kernels would not run
        (set(), ("portable",), ""),
    ],
)
def test_a_build_without_the_processors_vectors_says_so(
    built: Callable[..., None], processor: set[str], sets: tuple[str, ...], missing: str
) -> None:
    built(processor, instruction_sets=sets)
    reason = cpu.why_slow()
    if missing:
        assert re.search(rf"made no kernels for {missing}, which this processor has", reason or ""), reason
        assert "CC and CXX" in (reason or "")
    else:
        assert reason is None


@needs_native
def test_the_build_at_hand_left_nothing_out() -> None:
    assert cpu.why_slow() is None


# Source folders and installed copies

USE = """
import warnings
import torch
from semeda_fast import SemedaLoss, backend_info
torch.manual_seed(0)
logits, target = torch.randn(1, 4, 16, 16), torch.randint(0, 4, (1, 16, 16))
criterion = SemedaLoss(num_classes=4)
first = criterion(logits, target)  # here
compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")(logits, target)
assert (compiled - first).abs() < 1e-5 and criterion(logits[..., :8], target[..., :8]) > 0
info = backend_info()
[status] = [status for status in info.backends if status.name == "cpu"]
print(info.auto["cpu"], status.reason, sep="\\n")
try:
    SemedaLoss(num_classes=4, backend="cpu")
except RuntimeError as error:
    assert status.reason in str(error), error
"""


@needs_native
@needs_links
def test_a_source_folder_that_hides_the_installed_copy(tmp_path: Path) -> None:
    """`pip install .`, then Python in the source folder; and what the warning advises works."""
    source, site, packages = installs.checkout(tmp_path / "source"), tmp_path / "site", installs.others(tmp_path / "o")
    package = installs.installed(site)
    done = installs.run_script(USE, source, site, packages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference\n")
    line = next(n for n, text in enumerate(USE.splitlines(), 1) if text.endswith("# here"))
    [warned] = [text for text in done.stderr.splitlines() if "Warning" in text]
    assert warned.startswith(f"{tmp_path / 'script.py'}:{line}: UserWarning: SemedaLoss runs on the slower reference")
    for part in (f"source folder {source / 'semeda_fast'}", f"not the copy in {package}", f"-e {source}"):
        assert part in warned
        assert part in done.stdout
    assert "compiler" not in done.stdout
    elsewhere = installs.run_script(USE, tmp_path, site, packages)
    assert (elsewhere.returncode, elsewhere.stdout) == (0, "cpu\n\n"), elsewhere.stderr
    assert "Warning" not in elsewhere.stderr


@needs_links
@pytest.mark.parametrize("pure", [True, False])
def test_an_install_without_a_compiler_says_another_thing(tmp_path: Path, pure: bool) -> None:
    source, site, packages = tmp_path / "the source", tmp_path / "site", installs.others(tmp_path / "o")
    installs.checkout(source)
    installs.installed(site, native=False, pure=pure, made_from=source)
    done = installs.run_script(USE, tmp_path, site, packages)
    assert done.returncode == 0, done.stderr
    [warned] = [text for text in done.stderr.splitlines() if "Warning" in text]
    assert "SEMEDA_FAST_BUILD=none" in warned if pure else "no working C++ compiler was found when" in warned
    assert f'Install it with: SEMEDA_FAST_BUILD=cpu python -m pip install "{source}"' in warned
    assert "source folder" not in warned
    assert done.stdout.startswith("reference\n")
