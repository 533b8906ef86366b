"""How the CUDA backend is chosen, what it refuses, and what it hands to its kernels; what those compute is tested with
every backend's guarantees, on a GPU or in an emulation of one."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, value_and_grad
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from semeda_fast import EdgeProxy, SemedaLoss, backend_info
from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends import native, trial
from semeda_fast.backends import registry as backends
from semeda_fast.backends.config import config_text, parse_config
from semeda_fast.backends.native import CudaInfo
from semeda_fast.backends.params import describe
from semeda_fast.backends.problem import Outputs, Problem
from semeda_fast.spec import LossSpec

HERE = backends.get("cuda").devices[0]
RUNS = "cuda" in backends.available_names(HERE)
needs_kernels = pytest.mark.skipif(not RUNS, reason=f"the CUDA kernels cannot run here: {cuda_ops.why_unavailable()}")
needs_emulation = pytest.mark.skipif(not cuda_ops.emulated(), reason="needs the emulation of a GPU")
LAYERS = 3


class Params:
    """LossParams that notes what is set."""

    def __init__(self, other: Params | None = None) -> None:
        self.layers: list[tuple[Any, ...]] = []
        self.codes: tuple[int, int] | None = None
        self.proxy: tuple[int, int] | None = None
        if other is not None:
            self.__dict__.update(other.__dict__)

    def add_layer(self, *layer: Any) -> None:
        self.layers.append(layer)

    def set_proxy(self, span: tuple[int, int]) -> None:
        self.proxy = span


class Module:
    """Stands for `_C_cuda`: writes known numbers, and notes each call."""

    LossParams = Params

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int, int]] = []
        self.asked: list[tuple[Any, int]] = []
        self.refusal = ""
        self.code_bytes_off = 0

    def View(self, address: int, dtype: int, strides: Any, offset: int, num_bytes: int, *groups: int) -> Any:
        assert not any(groups)
        return address, dtype, list(strides), offset, num_bytes

    def why_unavailable(self) -> str:
        return "the driver is too old"

    def why_unsupported(self, params: Params, device: int) -> str:
        self.asked.append((params, device))
        return self.refusal

    def code_bytes(self, params: Any) -> int:
        return int(19 * params.n * params.h * params.w + self.code_bytes_off)

    def workspace_bytes(self, params: Params, device: int) -> int:
        return 1000

    def cuda_forward(self, params: Any, workspace: tuple[int, int], device: int, stream: int) -> None:
        address, num_bytes = workspace
        assert address % 64 == 0
        assert address
        assert num_bytes == 1000
        assert params.terms[1] == 4 * (3 + LAYERS)
        assert params.counts[1] == 16
        terms = (ctypes.c_float * (3 + LAYERS)).from_address(params.terms[0])
        terms[:] = [1.5, 2.5, 3.5, 4.0, 5.0, 6.0]
        (ctypes.c_int64 * 2).from_address(params.counts[0])[:] = [7, 0]
        self.calls.append(("forward", params, device, stream))

    def cuda_backward(self, params: Any, workspace: tuple[int, int], device: int, stream: int) -> None:
        self.calls.append(("backward", params, device, stream))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """A stand-in in the place of the compiled module."""
    made = Module()
    monkeypatch.setattr(cuda_ops, "cuda_module", lambda: made)
    monkeypatch.setattr(cuda_ops, "cuda_info", lambda: CudaInfo(True, "", (80, 86, 90, -90)))
    caches = cuda_ops._why_not_on, cuda_ops._drivers_refusal
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


def spec_of(proxy: EdgeProxy, **options: Any) -> LossSpec:
    ones = (1,) * proxy.num_layers
    zeros = (0,) * proxy.num_layers
    weights = tuple(0.5 + number for number in range(proxy.num_layers))
    return LossSpec(weights, (2.0,) * proxy.num_layers, ones, ones, zeros, **{"ignore_index": VOID, **options})


def problem_of(logits: Tensor, target: Tensor, proxy: EdgeProxy | None = None, **options: Any) -> Problem:
    proxy = make_proxy() if proxy is None else proxy
    valid, weight = options.pop("valid", None), options.pop("class_weight", None)
    flat = torch.cat([tensor.reshape(-1) for tensor in (*proxy.weights, *proxy.biases)])
    config = parse_config(config_text(proxy.weights, spec_of(proxy, **options), True))
    return Problem(logits.detach(), target, valid, weight, flat, config)


def forward(problem: Problem, save: bool = True) -> Outputs:
    outputs = cuda_ops.ops.outputs(problem.logits, problem.target, problem.config, save)
    cuda_ops._forward(problem, outputs)
    return outputs


# What it takes and what it refuses


PROXIES: dict[str, dict[str, Any]] = {
    "default": {},
    "four": {"widths": (16, 32, 32)},
    "wide": {"widths": (32, 64), "edge_classes": 64},
    "deep": {"widths": (16, 32, 32, 32, 32, 32), "edge_classes": 16},
}
OTHERS: dict[str, dict[str, Any]] = {
    "two layers": {"widths": (8,), "edge_classes": 4},
    "other widths": {"widths": (16, 16)},
    "other classes": {"edge_classes": 3},
    "other kernel": {"kernel_size": 5},
}


def refusal(proxy: EdgeProxy, dtype: torch.dtype = torch.bfloat16, soft: bool = False, **options: Any) -> str | None:
    """What the registry says for such a loss."""
    channels = 1 if options.get("mode") == "binary" else proxy.num_classes
    logits = torch.zeros(1, channels, 4, 5, dtype=dtype, device=HERE)
    target = logits.float().softmax(1) if soft else torch.zeros(1, 4, 5, dtype=torch.uint8, device=HERE)
    weights = [weight.to(HERE) for weight in proxy.weights]
    return backends.get("cuda").refusal(logits, target, weights, spec_of(proxy, **options))


REFUSED = [
    ({"dtype": torch.float64}, "the CUDA kernels compute in float32 at most, and the logits are float64"),
    ({"from_logits": False}, "the CUDA kernels take logits, not probabilities (from_logits=False)"),
    ({"soft": True}, "the CUDA kernels take labels, and the target is a distribution (torch.float32)"),
    ({"reduction": "none"}, "the CUDA kernels sum over pixels, and reduction='none' asks for a map"),
    ({"distance": "l2"}, "the CUDA kernels compute the distance 'l1', not 'l2'"),
    ({"distance": "smooth_l1"}, "the CUDA kernels compute the distance 'l1', not 'smooth_l1'"),
]


@needs_kernels
@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_taken(name: str, dtype: torch.dtype) -> None:
    """Tests skip what a backend refuses, so what it does not refuse is written down here."""
    proxy = make_proxy(**PROXIES[name])
    found = [
        refusal(proxy, dtype),
        refusal(proxy, dtype, tap="post"),
        refusal(proxy, dtype, label_smoothing=0.1, ignore_index=-100),
        refusal(make_proxy(2, **PROXIES[name]), dtype, mode="binary"),
        *(refusal(make_proxy(classes, **PROXIES[name]), dtype) for classes in (1, 2, 19, 21, 150, 256)),
    ]
    if dtype == torch.float32 and name in ("wide", "deep"):
        assert all("fit on chip" in str(reason) for reason in found), found
        return
    if HERE == "cuda" and (name != "default" or dtype == torch.float32) and set(found) != {None}:
        assert all("shared memory" in str(reason) for reason in found)  # what a GPU has is its own
        pytest.skip(str(found[0]))
    assert set(found) == {None}


@needs_kernels
@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused(options: dict[str, Any], reason: str) -> None:
    assert refusal(make_proxy(), **options) == reason


@needs_kernels
@pytest.mark.parametrize("name", OTHERS)
def test_proxies_without_a_kernel_are_refused(name: str) -> None:
    assert "CUDA kernels" in str(refusal(make_proxy(**OTHERS[name])))


@needs_kernels
def test_too_many_classes_and_a_network_that_no_fused_kernel_takes() -> None:
    assert refusal(make_proxy(257)) == "the CUDA kernels take up to 256 classes, the proxy has 257"
    assert "layer 0 has 65 channels" in str(refusal(make_proxy(widths=(65, 4))))


@needs_emulation
@pytest.mark.parametrize("soft", [False, True])
def test_by_name_a_refusal_is_an_error(soft: bool) -> None:
    logits, target = make_inputs(void=0.0)
    named = SemedaLoss(make_proxy(), backend="cuda", reduction="mean" if soft else "none")
    with pytest.raises(ValueError, match="backend 'cuda' cannot do this") as caught:
        named(logits, logits.detach().softmax(1) if soft else target)
    reason = REFUSED[2 if soft else 3][1]
    assert str(caught.value) == f"backend 'cuda' cannot do this: {reason}; use backend='auto' or 'reference'"


@needs_emulation
def test_the_emulation_is_never_chosen_by_itself() -> None:
    assert backend_info().auto["cpu"] != "cuda"
    assert "cuda" not in backends.available_names("cuda")  # it would read a GPU's addresses


# Availability


@pytest.mark.parametrize(
    ("built", "gpu", "info", "pattern"),
    [
        (None, False, CudaInfo(False, "no module"), r"this torch \(.*\) is built without CUDA.* \(not built here\)"),
        ("13.0", False, CudaInfo(True, "", (80, -90)), r"torch sees no GPU.* \(built for sm_80, PTX 9\.0\) run on"),
        ("13.0", True, CudaInfo(False, "not installed: SEMEDA_FAST_BUILD=cuda"), "^not installed: SEMEDA_FAST_BUILD"),
        ("13.0", True, CudaInfo(True, "", (80,)), "^the driver is too old; use backend='auto' or 'reference'$"),
    ],
)
def test_why_it_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, module: Module, built: str | None, gpu: bool, info: CudaInfo, pattern: str
) -> None:
    monkeypatch.setattr(cuda_ops, "emulated", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(cuda_ops, "_has_gpu", lambda: gpu)
    monkeypatch.setattr(cuda_ops, "cuda_info", lambda: info)
    reason = cuda_ops.why_unavailable()
    assert reason is not None
    assert re.search(pattern, reason), reason


def test_a_module_that_is_not_there_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CUDA_EMULATION", "")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    native._load_cuda.cache_clear()
    native.cuda_info.cache_clear()
    try:
        info = native.cuda_info()
    finally:
        native._load_cuda.cache_clear()
        native.cuda_info.cache_clear()
    assert not info.available
    for part in ("semeda_fast._C_cuda is missing", "only where it is asked to", "SEMEDA_FAST_BUILD=cuda", "nvcc"):
        assert part in info.reason


def test_an_emulation_that_does_not_load_is_no_reason_for_an_import_to_fail() -> None:
    code = "import semeda_fast; print(semeda_fast.backend_info())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SEMEDA_FAST_CUDA_EMULATION": "nowhere/module.so"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "nowhere/module.so, named by SEMEDA_FAST_CUDA_EMULATION, cannot be loaded" in done.stdout


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ((80,), (8, 0), True),
        ((80,), (8, 6), True),  # binary code runs on later minor versions
        ((86,), (8, 0), False),
        ((80, 86), (7, 5), False),
        ((80, 90), (10, 0), False),
        ((80, -90), (10, 0), True),  # PTX runs on everything later
        ((80, -90), (12, 1), True),
        ((-90,), (8, 9), False),
        ((100,), (10, 3), True),
        ((120,), (10, 0), False),
        ((), (9, 0), False),
    ],
)
def test_which_gpu_runs_which_code(architectures: tuple[int, ...], capability: tuple[int, int], runs: bool) -> None:
    assert cuda_ops.runs_on(architectures, capability) == runs


def test_a_gpu_of_no_architecture_built_for(monkeypatch: pytest.MonkeyPatch, module: Module) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    config = config_text(make_proxy().weights, spec_of(make_proxy()), False)
    reason = cuda_ops._why_not_on(config, torch.float32, torch.device("cuda", 1))
    assert reason == (
        "the CUDA kernels were built for sm_80, sm_86, sm_90, PTX 9.0, and cuda:1 has compute capability 7.5"
    )
    assert module.asked == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cuda_ops._why_not_on(config, torch.float32, torch.device("cuda", 2)) is None
    assert module.asked[0][1] == 2


# What the module is asked and given


def test_the_module_is_asked_once_for_a_proxy_a_dtype_and_a_device(module: Module) -> None:
    proxy = make_proxy()
    module.refusal = "the CUDA kernels know no such proxy"

    def ask(dtype: torch.dtype, side: int, **options: Any) -> str | None:
        logits, target = torch.zeros(2, 5, side, side, dtype=dtype), torch.zeros(2, side, side, dtype=torch.uint8)
        return cuda_ops.why_unsupported(logits, target, proxy.weights, spec_of(proxy, **options))

    assert {ask(torch.float32, 4), ask(torch.float32, 9), ask(torch.bfloat16, 4)} == {module.refusal}
    assert len(module.asked) == 2
    ask(torch.float32, 4, tap="post")
    assert len(module.asked) == 3
    params: Any = module.asked[0][0]
    assert (params.n, params.h, params.w, params.classes) == (1, 1, 1, 5)
    assert params.logits == (0, 0, [0, 0, 0, 0], 0, 0)
    assert params.proxy is None  # no addresses: it may be asked under a compiler
    assert [layer[:3] for layer in params.layers] == [(16, 5, 3), (32, 16, 3), (2, 32, 3)]


def test_what_forward_hands_over(module: Module) -> None:
    base = torch.randn(2, 5, 6, 16)
    logits, target = base[..., ::2], torch.randint(0, 5, (2, 8, 6), dtype=torch.int16).transpose(1, 2)
    valid = torch.ones(2, 6, 8, dtype=torch.bool)
    weight = torch.rand(5, dtype=torch.float64)
    proxy = make_proxy()
    problem = problem_of(logits, target, proxy, valid=valid, class_weight=weight, label_smoothing=0.25, tap="post")
    outputs = forward(problem)
    ((kind, params, device, stream),) = module.calls
    assert (kind, device, stream) == ("forward", 0, 0)
    assert (params.n, params.h, params.w, params.classes, params.binary, params.soft) == (2, 6, 8, 5, False, False)
    assert params.logits == (base.data_ptr(), 0, [480, 96, 16, 2], 0, 4 * 960)
    assert params.target == (target.data_ptr(), 5, [48, 0, 1, 6], 0, 2 * 96)
    assert params.valid == (valid.data_ptr(), 3, [48, 0, 8, 1], 0, 96)
    assert (params.ignore_index, params.label_smoothing, params.tap, params.distance) == (VOID, 0.25, 1, 0)
    assert params.class_weight[0] not in (0, weight.data_ptr())  # kernels read fp32
    assert params.class_weight[1] == 4 * 5
    assert params.codes == (outputs.codes.data_ptr(), 19 * 2 * 6 * 8)
    assert outputs.codes.shape == (19 * 2 * 6 * 8,)
    assert params.proxy == (problem.flat.data_ptr(), 4 * problem.flat.numel())
    assert params.layers[1][3:] == (1 / (32 * 2.0), 1.5 / (32 * 2.0))
    # What the kernel wrote, in the order of csrc/params.h.
    assert [float(value) for value in (outputs.ce, outputs.semeda, outputs.ce_weight)] == [1.5, 2.5, 3.5]
    assert outputs.per_layer.tolist() == [4.0, 5.0, 6.0]
    assert int(outputs.valid_count) == 7


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_labels_of_any_width_in_binary_mode(module: Module, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    problem = problem_of(logits, torch.ones(1, 3, 4).to(dtype), make_proxy(2), mode="binary")
    forward(problem, save=False)
    params = module.calls[0][1]
    assert (params.binary, params.classes, params.codes, params.logits[1]) == (True, 2, None, 1)
    codes = {torch.bool: 3, torch.uint8: 3, torch.int8: 4, torch.int32: 6, torch.int64: 7}
    assert params.target[1] == codes[dtype]


def test_what_backward_hands_over(module: Module) -> None:
    logits, target = make_inputs(n=1, h=3, w=4)
    problem = problem_of(logits, target)
    d_logits = torch.empty_like(logits).contiguous(memory_format=torch.channels_last)
    codes, one, two = torch.zeros(19 * 12, dtype=torch.uint8), torch.tensor(1.0), torch.tensor(2.0)
    cuda_ops._backward(problem, codes, torch.empty(0), one, two, d_logits)
    ((kind, params, _, _),) = module.calls
    assert kind == "backward"
    assert params.codes == (codes.data_ptr(), 19 * 12)
    assert params.d_ce == (one.data_ptr(), 0, [0, 0, 0, 0], 0, 4)
    assert params.d_semeda == (two.data_ptr(), 0, [0, 0, 0, 0], 0, 4)
    assert params.d_semeda_is_map is False
    assert params.d_logits == (d_logits.data_ptr(), 0, [60, 1, 20, 5], 0, 4 * 60)


def test_nothing_is_launched_without_pixels(module: Module) -> None:
    problem = problem_of(torch.zeros(0, 5, 3, 4), torch.zeros(0, 3, 4, dtype=torch.int64))
    outputs = forward(problem)
    cuda_ops._backward(problem, outputs.codes, outputs.saved_d, outputs.ce, outputs.ce, torch.empty(0, 5, 3, 4))
    assert module.calls == []
    assert not any(value.any() for value in outputs[:5])


def test_codes_of_another_size_are_never_written(module: Module) -> None:
    module.code_bytes_off = 1
    with pytest.raises(RuntimeError, match=r"writes 229 bytes of codes where cuda.py has 228.*different versions"):
        forward(problem_of(*make_inputs(n=1, h=3, w=4)))
    assert module.calls == []


def test_the_launch_goes_to_the_tensors_device_and_its_current_stream(
    monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    device = torch.device("cuda", 3)
    made, entered, empty = [], [], torch.empty

    def allocate(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append((size, dtype, device))
        return empty(size, dtype=dtype)

    def guard(tensor: Any) -> Any:
        entered.append(tensor.device)
        return nullcontext()

    monkeypatch.setattr(cuda_ops, "on_device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda at: types.SimpleNamespace(cuda_stream=77 + at.index))
    monkeypatch.setattr(torch, "empty", allocate)
    params = describe(module, parse_config(problem_config()), torch.float32)
    logits: Any = types.SimpleNamespace(device=device)
    cuda_ops._queue(module.cuda_backward, params, logits)
    assert module.calls == [("backward", params, 3, 80)]
    assert made == [(1000, torch.uint8, device)]
    assert entered == [device]


def problem_config(**options: Any) -> str:
    return config_text(make_proxy().weights, spec_of(make_proxy(), **options), False)


@pytest.mark.parametrize(
    ("channels", "expected"), [((16, 32, 2), 19), ((16, 32, 32, 2), 31), ((32, 64, 64), 52), ((64, 64), 40)]
)
def test_bytes_kept_for_backward(channels: tuple[int, ...], expected: int) -> None:
    assert cuda_ops.code_bytes_per_pixel(channels) == expected


@needs_kernels
@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("tap", ["pre", "post"])
def test_the_module_counts_the_same_bytes(name: str, tap: str) -> None:
    native_module = native.cuda_module()
    proxy = make_proxy(**PROXIES[name])
    config = parse_config(config_text(proxy.weights, spec_of(proxy, tap=tap), False))
    for n, h, w in ((1, 1, 1), (2, 13, 17), (3, 64, 65)):
        params = describe(native_module, config, torch.float16)
        params.n, params.h, params.w = n, h, w
        logits = torch.empty(n, NUM_CLASSES, h, w, device="meta")
        kept = cuda_ops.saved(logits, logits[:, 0], config)
        assert kept.codes == (native_module.code_bytes(params),)


def test_bytes_kept_follow_symbolic_sizes() -> None:
    """Traced once with symbols, the graph allocates what other sizes need."""
    config = parse_config(problem_config())

    def allocate(logits: Tensor) -> Tensor:
        return logits.new_empty(cuda_ops.saved(logits, logits[:, 0], config).codes, dtype=torch.uint8)

    traced = make_fx(allocate, tracing_mode="symbolic")(torch.empty(2, 5, 13, 17))
    assert traced(torch.empty(3, 5, 7, 9)).shape == (19 * 3 * 7 * 9,)


# The trial


@pytest.fixture
def on_trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU passes for a GPU on which the first use is a trial."""
    monkeypatch.setattr(trial, "TRIAL_SIZE", (9, 35))
    monkeypatch.setattr(cuda_ops, "_is_on_trial", lambda device: True)
    trial.trial.cache_clear()
    yield
    trial.trial.cache_clear()


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_that_works(on_trial: None, dtype: torch.dtype) -> None:
    logits, target = make_inputs(n=1, h=5, w=6, dtype=dtype)
    value_and_grad(SemedaLoss(make_proxy(), ignore_index=VOID, backend="cuda"), logits, target)
    value_and_grad(SemedaLoss(make_proxy(), ignore_index=VOID, backend="cuda"), logits[..., :4], target[..., :4])
    assert trial.trial.cache_info().misses == 1


@needs_emulation
def test_a_trial_that_computes_something_else(on_trial: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cuda_ops.ops.backward

    def wrong(problem: Problem, *tensors: Tensor) -> None:
        real(problem, *tensors)
        tensors[-1].neg_()

    monkeypatch.setattr(cuda_ops.ops, "backward", wrong)
    logits, target = make_inputs(n=1, h=5, w=6)
    message = (
        "backend 'cuda' does not work here: the CUDA kernels compute wrong values on cpu: the gradient is off by 2"
    )
    with pytest.raises(ValueError, match=message):
        SemedaLoss(make_proxy(), ignore_index=VOID, backend="cuda")(logits, target)


@needs_emulation
def test_automatically_a_failed_trial_leaves_the_loss_to_another_backend(
    on_trial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nand more")

    monkeypatch.setattr(cuda_ops.ops, "forward", fail)
    registry = {**backends._registry, "cuda": dataclasses.replace(backends.get("cuda"), by_name_on=())}
    monkeypatch.setattr(backends, "_registry", {name: registry[name] for name in ("reference", "cuda")})
    monkeypatch.setattr(backends, "_fallbacks", {})
    logits, target = make_inputs(n=1, h=5, w=6)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    with pytest.warns(UserWarning, match="reference backend: the CUDA kernels do not compile or run on cpu: RuntimeE"):
        criterion(logits, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(logits, target)
    assert len(backend_info().fallbacks) == 1
