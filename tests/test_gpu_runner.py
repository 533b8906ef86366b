"""`make gpu` as far as it runs without a GPU: arguments, shares of the time, test processes, plans, layers, report."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.contenders import contenders
from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import layers as gpu_layers
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import session as gpu
from benchmarks.gpu import tests as gpu_tests
from benchmarks.networks import GPU_NETWORKS
from benchmarks.suite import runner
from benchmarks.suite.plans import Plan, make_plans
from benchmarks.timing import Budget
from benchmarks.workloads import make_proxy, named
from semeda_fast.backends import cuda as cuda_ops
from semeda_fast.backends import trial
from semeda_fast.backends import triton as triton_ops
from semeda_fast.spec import LossSpec

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "a device of the tests"
MODULES = {"triton": "3", "pytest": "8", "pybind11": "2", "setuptools": "80", "PIL": "1", "matplotlib": None}
FACTS = {"gpu": DEVICE, "capability": "0.0", "torch": "2", "python": "3", "modules": MODULES}
# Plugins that a machine may lack are left out: timeout, xdist, benchmark.
BARE = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
FAKE_TESTS = """
import os, time
import pytest

def test_good(): pass

def test_bad(): assert 1 == 2, "one is not two"

@pytest.mark.timeout(60)
def test_left_aside(): pytest.skip("not today")

@pytest.fixture
def broken(): raise RuntimeError("no fixture")

def test_error(broken): pass

@pytest.mark.parametrize("case", ["triton-cuda", "reference-cuda", "cpu-cpu"])
def test_case(case): pass

def test_dies(): os._exit(7)

def test_never_begun(): pass
"""
SLOW_TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(40))
def test_slow(number): time.sleep(max(0, float(os.environ["SEMEDA_FAST_GPU_DEADLINE"]) - time.time() + 0.1))
"""


def test_phases_are_chosen_and_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    parse = gpu.parser().parse_args
    assert gpu.chosen_phases(parse([]).only) == ["tests", "bench", "layers", "tiles", "report"]
    assert gpu.chosen_phases(parse(["--only", "tests"]).only) == ["tests", "report"]
    assert gpu.chosen_phases(parse(["--only", "layers,bench"]).only) == ["bench", "layers", "report"]
    assert gpu.chosen_phases(parse(["--only", "layers", "--only", "tests"]).only) == ["tests", "layers", "report"]
    assert gpu.chosen_phases(parse(["--only", "tiles"]).only) == ["tiles", "report"]
    for bad in (["--only", "test"], ["--limit", "0"], ["--jobs", "0"]):
        with pytest.raises(SystemExit) as caught:
            gpu.main(bad)
        assert caught.value.code == 2
    assert "'test' is no phase; expected some of tests, bench, layers, tiles, report" in capsys.readouterr().err


def test_the_shares_never_exceed_the_limit_and_pass_on_what_is_left() -> None:
    assert gpu.LIMIT + gpu.GRACE + 10 <= 540  # nine minutes
    phases = list(gpu.PHASES)
    left = gpu.LIMIT
    for name in phases[:-1]:
        share = gpu.time_for(name, phases, left)
        assert 0 < share < left
        left -= share
    assert left == pytest.approx(gpu.REPORT_RESERVE)
    # Tests that end early give their time to the others, and a phase alone gets all.
    assert gpu.time_for("bench", phases, gpu.LIMIT - 10) > 1.5 * gpu.time_for("bench", phases, gpu.LIMIT / 2)
    assert gpu.time_for("layers", ["layers", "report"], 100.0) == pytest.approx(100.0 - gpu.REPORT_RESERVE)
    assert gpu.time_for("layers", phases, 3.0) == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_without_a_gpu_it_says_what_it_looked_for_and_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == gpu.NO_GPU != 0
    for part in ("no GPU to run on", "looked for:", sys.executable, "torch", "make gpu PYTHON=", "make test", "--list"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_python_without_torch_gets_the_message_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PROBE", 'print(\'{"problem": "torch cannot be imported: no module"}\')')
    assert gpu.main(["--output", str(tmp_path)]) == gpu.NO_GPU
    assert "torch cannot be imported" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "PROBE", "raise SystemExit(1)")
    assert gpu.main(["--output", str(tmp_path)]) == gpu.NO_GPU
    assert "asking torch for a GPU failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_list_holds_commands_that_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list", "--output", str(tmp_path), "--tests", "not sanitizer", "--plans", "voc"]) == 0
    text = capsys.readouterr().out
    commands = [shlex.split(line[line.index(sys.executable) :]) for line in text.splitlines() if sys.executable in line]
    tests = [command for command in commands if command[2] == "pytest"]
    others = {command[2]: command[3:] for command in commands if command[2] != "pytest"}
    assert set(others) == {f"benchmarks.gpu.{name}" for name in ("bench", "layers", "tiles", "report")}
    for name in ("layers", "tiles"):
        *words, limit = others[f"benchmarks.gpu.{name}"]
        assert words == ["--output", str(tmp_path), "--limit"]
        assert float(limit) > 45
    for name in others:
        assert importlib.util.find_spec(name) is not None
    parsed = gpu_bench.parser().parse_args(others["benchmarks.gpu.bench"])
    assert (parsed.output, parsed.plans) == (tmp_path, "voc")
    assert parsed.limit > 60
    files = [next(word for word in command if word.endswith(".py")) for command in tests]
    assert all((ROOT / file).is_file() for file in files)
    # Values first, each for both fused backends; then the guarantees, and at last what is of neither backend.
    own = list(dict.fromkeys(file for file in files if file.startswith("tests/gpu/")))
    shared = gpu_tests.guarantee_files(ROOT)
    assert files == [*(file for file in [*own, *shared] for _ in gpu_tests.BACKENDS), *own, *shared]
    assert own[0] == "tests/gpu/test_gpu_values.py"
    assert tests[0][-1] == "-k=(cuda]) and (not sanitizer)"
    assert tests[1][-1] == "-k=(triton]) and (not sanitizer)"
    assert len(own) == len(list((ROOT / "tests" / "gpu").glob("test_*.py"))) >= 4
    assert {"tests/test_void_and_empty.py", "tests/test_dtypes_and_layouts.py"} <= set(shared)


def test_the_suites_of_the_guarantees_need_no_plugin_and_select_the_device() -> None:
    suites = {suite.name: suite for suite in gpu_tests.suites(ROOT, "not sanitizer")}
    assert suites["triton: void_and_empty"].command[-1] == "-k=(triton-cuda) and (not sanitizer)"
    command = [*suites["others: void_and_empty"].command, "--collect-only"]
    result = subprocess.run(command, cwd=ROOT, env=BARE, capture_output=True, text=True, timeout=60, check=False)
    listed = [line for line in result.stdout.splitlines() if "::" in line]
    if torch.cuda.is_available():
        assert listed
        assert all("reference-cuda" in line for line in listed)
    else:
        assert result.returncode == 5, result.stdout + result.stderr  # nothing selected
        assert listed == []
        assert "deselected" in result.stdout


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and results of three suites: of mixed outcomes, of selected tests, and one that is too slow."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_fake.py").write_text(FAKE_TESTS)
    (folder / "tests" / "test_slow.py").write_text(SLOW_TESTS)
    mixed = gpu_tests.Suite("mixed", gpu_tests._command("tests/test_fake.py", "", ""))
    fused = gpu_tests.Suite("fused", gpu_tests._command("tests/test_fake.py", "-cuda and not reference-cuda", ""))
    slow = gpu_tests.Suite("slow", gpu_tests._command("tests/test_slow.py", "", ""))
    results = gpu_tests.run_suites([mixed, fused], folder, BARE, 60.0, 2)
    return folder, [*results, *gpu_tests.run_suites([slow], folder, BARE, 4.1, 1)]


def test_every_test_is_in_one_suite_and_in_its_backends(tmp_path: Path) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    own = "import pytest\n\n@pytest.mark.parametrize('backend', ['cuda', 'triton', 'reference'])\n"
    own += (
        "@pytest.mark.parametrize('x', ['cuda', 'a'])\ndef test_cuda_graph(backend, x): pass\n\ndef test_none(): pass\n"
    )
    for name in ("gpu_compile", "gpu_values"):
        (tmp_path / "tests" / "gpu" / f"test_{name}.py").write_text(own)
    cases = ["cuda-cuda", "triton-cuda", "reference-cuda", "new-cuda", "triton-cpu", "cuda-cpu"]
    shared = f"import pytest\n\n@pytest.mark.parametrize('case', {cases})\ndef test_x(case): pass  # case: Case\n"
    (tmp_path / "tests" / "test_shared.py").write_text(shared)
    found: dict[str, list[str]] = {}
    for suite in gpu_tests.suites(tmp_path):
        command = [*suite.command, "--collect-only"]
        result = subprocess.run(
            command, cwd=tmp_path, env=BARE, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        found[suite.name] = [line.split("::")[1] for line in result.stdout.splitlines() if "::" in line]
    of_gpu = {name: [f"test_cuda_graph[{x}-{name}]" for x in ("cuda", "a")] for name in ("cuda", "triton", "reference")}
    rest = [*of_gpu["reference"], "test_none"]
    assert list(found) == [
        *("cuda: gpu_values", "triton: gpu_values", "cuda: gpu_compile", "triton: gpu_compile"),
        *("cuda: shared", "triton: shared", "others: gpu_values", "others: gpu_compile", "others: shared"),
    ]
    for file in ("gpu_values", "gpu_compile"):
        expected = {"cuda": of_gpu["cuda"], "triton": of_gpu["triton"], "others": rest}
        assert {name: sorted(found[f"{name}: {file}"]) for name in expected} == {
            k: sorted(v) for k, v in expected.items()
        }
    assert found["cuda: shared"] == ["test_x[cuda-cuda]"]
    assert found["triton: shared"] == ["test_x[triton-cuda]"]
    assert found["others: shared"] == ["test_x[reference-cuda]", "test_x[new-cuda]"]


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {test["name"].split("::")[1]: test["outcome"] for test in result["tests"]}


def test_a_watched_process_runs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends with a trial ask `trial.first_use`, which must not come to the reference any more."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    one_step = importlib.import_module("one_step")
    monkeypatch.setattr(trial, "trial", pytest.fail)
    one_step.without_trial()
    ones = (1,) * 3
    spec = LossSpec((1.0,) * 3, (1.0,) * 3, ones, ones, (0,) * 3)
    for ops in (cuda_ops, triton_ops):
        assert ops.first_use is trial.first_use
        assert ops.first_use(ops.ops, torch.zeros((1, 2, 3, 4)), make_proxy(named("voc")).weights, spec) is None


def test_every_outcome_is_recorded_even_of_a_process_that_dies(fake: tuple[Path, list[dict[str, Any]]]) -> None:
    mixed = fake[1][0]
    assert outcomes(mixed) == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left_aside": "skipped",
        "test_error": "error",
        "test_case[triton-cuda]": "passed",
        "test_case[reference-cuda]": "passed",
        "test_case[cpu-cpu]": "passed",
        "test_dies": "error",
        "test_never_begun": "not run",
    }
    assert mixed["state"] == "failed"
    reasons = {test["name"].split("::")[1]: test["reason"] for test in mixed["tests"]}
    assert "one is not two" in reasons["test_bad"]
    assert reasons["test_left_aside"].endswith("not today")
    assert "exit code 7" in reasons["test_dies"]
    assert str(fake[0]) not in json.dumps(mixed)


def test_the_selection_takes_the_fused_backends_alone(fake: tuple[Path, list[dict[str, Any]]]) -> None:
    assert outcomes(fake[1][1]) == {"test_case[triton-cuda]": "passed"}
    assert fake[1][1]["state"] == "done"


def test_a_suite_stops_at_the_deadline_and_names_what_did_not_run(fake: tuple[Path, list[dict[str, Any]]]) -> None:
    slow = fake[1][2]
    found = list(outcomes(slow).values())
    assert slow["state"] == "cut short"
    assert len(found) == 40
    assert found.count("not run") >= 39
    assert set(found) <= {"passed", "not run"}
    summary = gpu_tests.summarise(fake[1])
    assert summary["broken"] == ["mixed"]
    assert summary["left_out"] == []
    text = "\n".join(gpu_tests.failures_text(summary))
    assert "FAILED tests/test_fake.py::test_bad" in text
    assert "CUT SHORT slow" in text
    unknown = gpu_tests.Suite("late", ("no such program",))
    late = gpu_tests.run_suites([unknown], ROOT, BARE, 1.0, 1)
    assert late[0]["state"] == "left out"
    assert gpu_tests.summarise(late)["left_out"] == ["late"]


def test_exit_codes_of_pytest_become_states() -> None:
    passed, waiting, failed = ({"outcome": outcome} for outcome in ("passed", "not run", "failed"))
    assert gpu_tests.verdict(0, [passed])[0] == "done"
    assert gpu_tests.verdict(5, [])[0] == "done"
    assert gpu_tests.verdict(2, [passed, waiting])[0] == "cut short"
    assert gpu_tests.verdict(None, [passed, waiting])[0] == "cut short"
    assert gpu_tests.verdict(1, [passed, failed])[0] == "failed"
    assert gpu_tests.verdict(3, [passed]) == ("failed", "pytest ended with exit code 3")
    assert gpu_tests.verdict(-11, [passed, waiting])[0] == "failed"


def test_the_tree_is_what_an_install_would_hold(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    gpu.stage(ROOT, tree)
    (tree / "semeda_fast" / "left_over.py").touch()
    gpu.stage(ROOT, tree)
    assert not (tree / "semeda_fast" / "left_over.py").exists()
    assert not [*tree.rglob("_C.*"), *tree.rglob("_C_cuda.*")]
    assert not (tree / "benchmarks" / "results").exists()
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name for path in (tree / "semeda_fast" / "kernels").glob("*.py")} == kernels
    code = (
        "import semeda_fast as s, semeda_fast.kernels as k, benchmarks as b; print(s.__file__, k.__file__, b.__file__)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tree, env=gpu.environment(tree), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(path).is_relative_to(tree) for path in result.stdout.split())


def test_what_is_missing_is_said_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    text = "\n".join(gpu.missing({"modules": {"pytest": "8"}}))
    for part in ("no triton", "no PIL", "no nvcc", "no C++ compiler", "no compute-sanitizer"):
        assert part in text
    assert "no pytest" not in text
    assert "no pybind11 and no setuptools in this Python: the backend 'cuda' cannot be built" in text


def test_a_folder_keeps_one_devices_results(tmp_path: Path) -> None:
    first = gpu.begin(dict(FACTS), "--only tests", tmp_path / "out")
    first.add(gpu.Phase("tests", "done", 3.0, 10.0))
    gpu.save(first, tmp_path / "out")
    second = gpu.begin(dict(FACTS), "--only bench", tmp_path / "out")
    assert second.phases["tests"]["state"] == "done"
    with pytest.raises(ValueError, match=f"results of {DEVICE}, and this is another; .*GPU_OUTPUT"):
        gpu.begin({**FACTS, "gpu": "another"}, "", tmp_path / "out")
    (tmp_path / "out" / gpu.SESSION).write_text("[]")
    with pytest.raises(ValueError, match="is no session of make gpu"):
        gpu.begin(dict(FACTS), "", tmp_path / "out")


def test_a_whole_call_with_a_stand_in_for_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layout, tests in a process, session, report, exit code: all but what needs a device."""
    (tmp_path / "test_fake.py").write_text("def test_good(): pass\n\ndef test_bad(): assert not 'seen in the report'\n")
    suite = gpu_tests.Suite("fake", gpu_tests._command(str(tmp_path / "test_fake.py"), "", ""))
    monkeypatch.setattr(gpu, "probe", lambda: dict(FACTS))
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "build", lambda *_: ["no module of this test"])
    monkeypatch.setattr(gpu_tests, "suites", lambda root, match: [suite])
    output = tmp_path / "out"
    assert gpu.main(["--only", "tests", "--output", str(output), "--limit", "60"]) == gpu.FAILED
    assert sorted(path.name for path in output.iterdir()) == [gpu_report.REPORT, gpu.SESSION, gpu_tests.RESULTS]
    phases = json.loads((output / gpu.SESSION).read_text())["phases"]
    assert phases["tests"]["state"] == "failed"
    assert phases["tests"]["problem"] == "1 passed, 1 failed"
    text = (output / gpu_report.REPORT).read_text()
    assert f"# semeda_fast on {DEVICE}" in text
    assert "test_bad` (failed)" in text
    for written in output.iterdir():
        assert str(ROOT) not in written.read_text()
    # Without the time for anything nothing is begun, and the code says so.
    monkeypatch.setattr(gpu, "module", lambda name: [sys.executable, "-c", "pass"])
    assert gpu.main(["--only", "layers", "--output", str(output), "--limit", "16"]) == gpu.CUT_SHORT
    phases = json.loads((output / gpu.SESSION).read_text())["phases"]
    assert [(phase["name"], phase["state"]) for phase in phases.values()] == [
        ("tests", "failed"),
        ("layers", "left out"),
    ]


def test_gpu_plans_are_of_known_contenders_and_survive_json() -> None:
    plans = gpu_bench.make_plans(4, ("triton",), "scenes")
    assert len({plan.name for plan in plans}) == len(plans)
    known = {*contenders("cuda"), "fused", "upsampling", "triton"}
    for plan in plans:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert plan.device == "cuda"
        assert plan.allocator == "default"
        for case in plan.cases:
            assert set(case.contenders) <= known
            assert case.kind == "peaks" or case.workload is not None
    voc, wide = (plan.cases[0].workload for plan in plans[1:3])
    assert voc is not None
    assert (voc.num_classes, voc.batch, voc.height, voc.width, voc.dtype) == (21, 16, 513, 513, "bfloat16")
    assert wide == voc.replace(proxy="wide")
    timed = [case for plan in plans for case in plan.cases if case.kind == "time"]
    assert all("fused" in case.contenders for case in timed)
    halves = [case for case in timed if case.workload is not None and case.workload.dtype != "float32"]
    assert all("autocast" in case.contenders for case in halves)
    kinds = {case.workload.labels for case in timed if case.workload is not None}
    assert kinds == {"scenes", "random"}
    steps = [case.network for plan in plans for case in plan.cases if case.kind == "step"]
    assert steps == list(GPU_NETWORKS)
    names = [plan.name for plan in plans]
    assert names.index("step-deeplab_resnet101-voc") < names.index("dtypes")  # the rest may be left out
    assert gpu_bench.main(["--output", "nowhere", "--plans", "no plan of this name"]) == 2


def test_cuda_plans_of_the_suite_leave_the_processors_threads_alone() -> None:
    for which in ("smoke", "quick", "full"):
        cuda = make_plans(which, device="cuda", threads=4, fused=("triton",))
        assert {case.suite for plan in cuda for case in plan.cases} >= {"headline", "scaling-pixels"}
        assert not any(case.suite == "scaling-threads" for plan in cuda for case in plan.cases)
        assert all(plan.cases for plan in cuda)
        cpu = make_plans(which, device="cpu", threads=4, fused=("cpu",))
        assert any(case.suite == "scaling-threads" for plan in cpu for case in plan.cases)


@pytest.fixture(scope="module")
def layers() -> tuple[list[dict[str, Any]], list[str]]:
    """The layers of the default proxy in miniature on the CPU, with a hook for two kernels, one of which fails."""

    def fail() -> None:
        raise RuntimeError("no such kernel")

    def cases(proxy: Any, n: int, h: int, w: int, dtype: torch.dtype) -> list[tuple[str, Any, int, int]]:
        assert (proxy.num_classes, n, h, w, dtype) == (21, 1, 6, 7, torch.float32)
        return [("forward 2", lambda: torch.ones(3), 12, 34), ("softmax", lambda: None, 56, 0), ("dgrad 1", fail, 1, 1)]

    proxy = make_proxy(named("voc"))
    patch = pytest.MonkeyPatch()
    module = types.ModuleType(gpu_layers.HOOK[0])
    module.layer_cases = cases  # type: ignore[attr-defined]
    patch.setitem(sys.modules, gpu_layers.HOOK[0], module)
    try:
        return gpu_layers.measure(
            "default", proxy, (1, 6, 7), torch.float32, budget=Budget(0.0, 3, 3), compiler="eager"
        )
    finally:
        patch.undo()


def test_every_layer_is_timed_in_all_forms(layers: tuple[list[dict[str, Any]], list[str]]) -> None:
    records, notes = layers
    assert notes == []
    names = list(dict.fromkeys(record["name"] for record in records))
    assert names == ["forward 1", "forward 2", "forward 3", "dgrad 3", "dgrad 2", "dgrad 1", "softmax"]
    found = {(record["name"], record["contender"]): record for record in records}
    assert len(found) == 6 * 2 + 3
    failed = found["dgrad 1", gpu_layers.OURS]
    assert failed["status"] == "failed"
    assert failed["reason"] == "RuntimeError: no such kernel"
    assert all(len(record["seconds"]) == 3 for record in records if record["status"] == "ok")
    # 16 -> 32 channels, 42 pixels, fp32.
    bare, whole = found["forward 2", gpu_layers.CONVOLUTION], found["forward 2", gpu_layers.EPILOGUE]
    assert bare["flop"] == whole["flop"] == 2 * 9 * 16 * 32 * 42
    assert bare["bytes"] == 4 * (9 * 16 * 32 + 42 * (16 + 32))
    assert whole["bytes"] == bare["bytes"] + 42 * 32 * (4 + 1)
    assert found["forward 2", gpu_layers.OURS]["bytes"] == 12


def test_the_dgrad_baseline_is_the_gradient_of_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = F.conv2d

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        given.append((x, weight))
        return real(x, weight, *rest, **named)

    proxy = make_proxy(named("voc"))
    cases = gpu_layers.baseline_cases(proxy, (1, 6, 7), torch.float32, "eager")
    bare = next(c for c in cases if (c.name, c.contender) == ("dgrad 2", gpu_layers.CONVOLUTION))
    monkeypatch.setattr(F, "conv2d", spy)
    ours = bare.run()
    (d_t, _) = given[0]
    monkeypatch.undo()
    assert d_t.is_contiguous(memory_format=torch.channels_last)
    expected = torch.nn.grad.conv2d_input((1, 16, 6, 7), proxy.weights[1], d_t, padding=1)
    torch.testing.assert_close(ours, expected)


def test_layers_without_a_hook_or_time_are_named() -> None:
    proxy = make_proxy(named("voc"))
    records, notes = gpu_layers.measure("default", proxy, (1, 4, 4), torch.float32, deadline=time.monotonic())
    assert records == []
    assert notes[-1].startswith("default: left out, the time was up: forward 1, forward 2")
    if importlib.util.find_spec(gpu_layers.HOOK[0]) is None:
        assert notes[0].startswith("default: semeda_fast.kernels.bench.layer_cases: ModuleNotFoundError")


def test_a_hook_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gpu_layers.HOOK[0], types.ModuleType(gpu_layers.HOOK[0]))  # without the function
    cases, note = gpu_layers.our_cases(make_proxy(named("voc")), (1, 4, 4), torch.float32)
    assert note == ""
    with pytest.raises(RuntimeError, match="layer_cases: AttributeError"):
        cases[0].run()


class Device:
    """Stands in for torch.cuda where time is taken: notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.slept: list[int] = []

    def synchronize(self) -> None:
        self.calls.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.calls.append("sleep")
        self.slept.append(cycles)

    def Event(self, enable_timing: bool) -> Any:
        calls = self.calls

        class Event:
            def record(self) -> None:
                calls.append("event")

            def elapsed_time(self, end: Any) -> float:
                return 7.0

        return Event()


def test_queued_times_let_the_device_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    for name in ("synchronize", "_sleep", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))

    def step() -> None:
        device.calls.append("step")
        time.sleep(0.002)

    taken = timing.interleaved({"x": step}, Budget(0.0, 2, 2), device="cuda", warmup=0)
    assert taken["x"].seconds == [0.007, 0.007]
    assert device.calls == 2 * ["wait", "event", "step", "event", "wait"]
    device.calls.clear()
    timing.interleaved({"x": step}, Budget(0.0, 2, 2), device="cuda", warmup=0, queued=True)
    assert device.calls[-12:] == 2 * ["wait", "sleep", "event", "step", "event", "wait"]
    # The wait is longer than the host took, at any clock that a GPU has.
    assert all(cycles > 0.002 * 2e9 for cycles in device.slept)


def timed(contender: str, family: str, seconds: list[float], queued: list[float], **more: Any) -> dict[str, Any]:
    facts = {"source": "scenes", "edge_share": 0.1, "mixed_share": 0.2, "void_share": 0.0, "note": ""}
    return {
        "kind": "time", "suite": "headline", "group": "one", "workload_name": "voc-miniature", "mode": "fwdbwd",
        "allocator": "default", "threads": 1, "labels": facts, "contender": contender, "family": family,
        "title": f"title of {contender}", "fused": family == "triton", "status": "ok", "seconds": seconds,
        "queued_seconds": queued, "saved_bytes_per_pixel": 18.5, "first_call_seconds": 1.0, **more,
    }  # fmt: skip


def test_the_report_of_recorded_results(tmp_path: Path, layers: tuple[list[dict[str, Any]], list[str]]) -> None:
    run = runner.Run("gpu", "gpu", {"gpu": DEVICE, "processor": "p", "cores": 1, "device": "cuda"})
    run.records = [
        {"kind": "peaks", "status": "ok", "fma_flops": 1e12, "fma_how": "x", "copy_bytes": 1e9, "copy_how": "y"},
        timed("autocast", "autocast", [0.06] * 5, [0.08] * 5),
        timed("autocast_cl", "autocast", [0.07] * 5, [0.04] * 5),
        timed("triton", "triton", [0.01] * 5, [0.005] * 5),
        timed("compiled", "compiled", [], [], status="wrong", reason="loss off by 1"),
    ]
    run.plans = [{"name": "voc-wide", "state": "left out", "seconds": 0.0, "problem": "the time was up"}]
    run.save(tmp_path)
    gpu_layers.write(tmp_path, {"gpu": DEVICE}, layers[0], ["a note of the layers"])
    assert gpu_report.main([str(tmp_path)]) == 0
    text = (tmp_path / gpu_report.REPORT).read_text()
    # The faster layout of each measure on its own: 60 / 10 and 40 / 5.
    row = next(line for line in text.splitlines() if line.startswith("| eager, bf16 autocast / triton |"))
    idle, queued = row.split("|")[2:4]
    assert "6.00x" in idle
    assert "(`autocast` / `triton`)" in idle
    assert "8.00x" in queued
    assert "(`autocast_cl` / `triton`)" in queued
    assert "* `compiled` on voc-miniature: WRONG: loss off by 1" in text
    assert "| voc-wide | left out | 0 | the time was up |" in text
    assert "a note of the layers" in text
    assert "| dgrad 1 | semeda_fast | FAILED: RuntimeError: no such kernel |" in text
    assert text.count("fastest |") == 1  # only "forward 2" has two whole forms
    assert "nan" not in text.lower().split()
    # Another device's part in the same folder is refused.
    gpu_layers.write(tmp_path, {"gpu": "another"}, layers[0], [])
    assert gpu_report.main([str(tmp_path)]) == 2


def test_the_layer_table_has_rates() -> None:
    record = {"name": "forward 1", "contender": "x", "status": "ok", "seconds": [0.002] * 3, "bytes": 4e9, "flop": 6e12}
    _, rows = gpu_report.layer_table([record])
    assert rows == [["forward 1", "x", "2.00 [2.00, 2.00]", "2000", "3000", ""]]


def test_an_empty_folder_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([str(tmp_path)]) == 2
    assert "holds none of session.json, tests.json, layers.json, tiles.json, results.json" in capsys.readouterr().err
    (tmp_path / gpu_tests.RESULTS).write_text("[]")
    assert gpu_report.main([str(tmp_path)]) == 2
    assert "is no result of make gpu" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_make_target_is_a_thin_shell() -> None:
    command = ["make", "--dry-run", "gpu", "PYTHON=some-python", "GPU_OUTPUT=out dir", "GPU_ARGS=--only tests"]
    # `make test` hands its own flags down, which would print more.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True)
    words = shlex.split(result.stdout.strip())
    assert words == ["some-python", "-m", "benchmarks.gpu", "--output", "out dir", "--only", "tests"]
