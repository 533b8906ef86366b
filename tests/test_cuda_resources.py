"""What nvcc makes of the CUDA kernels, and what the plan makes of it on each device, against tests/cuda_resources.json.

Without a GPU. `make test` reads the module that the development install built, for the architectures that it built,
and compiles no kernel; SEMEDA_FAST_AOT=full compiles all, in about 10 minutes. After a change that is meant:

    python csrc/tests/cuda_resources.py --write tests/cuda_resources.json               # minutes: needs nvcc
    python csrc/tests/cuda_resources.py --launches --write tests/cuda_resources.json    # seconds: the plan alone
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc" / "tests"))

import cuda_plan
import cuda_resources as resources

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "csrc" / "tests" / "cuda_resources.py"
STORED = Path(__file__).with_name("cuda_resources.json")
FULL = os.environ.get("SEMEDA_FAST_AOT", "") == "full"
GOOD = resources.Resources(registers=120, stack=0, spills=0, shared=0, products=400, matrix_loads=40)
FORWARD = "forward default half"
PLAN = cuda_plan.Plan(tile=(20, 28), shared=105_920, resident=True, blocks=2, warps=8)
QUERY = cuda_plan.Query(90, "voc", (16, 32, 2), True, False)
needs_compiler = pytest.mark.skipif(not cuda_plan.find_compiler(), reason="no C++ compiler for csrc/cuda/plan.cpp")

# As compilers of CUDA 13.0 print it, shortened.
BACKWARD_SYMBOL = (
    "_ZN11semeda_fast3gpu49_GLOBAL__N__1f3c0884_16_backward_tf32_cu_fcc47f5515backward_kernel"
    "INS0_5ProxyILi2EJLi16ELi32ELi32ELi2EEEEEEvNS0_7ProblemE"
)
PREPARE_SYMBOL = (
    "_ZN11semeda_fast3gpu41_GLOBAL__N__1fe7de3d_9_launch_cu_3bf936fb14prepare_kernelINS0_{}EEEvNS0_6LaunchE"
)
FINISH_SYMBOL = "_ZN11semeda_fast3gpu41_GLOBAL__N__1fe7de3d_9_launch_cu_3bf936fb13finish_kernelENS0_7ProblemE"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{BACKWARD_SYMBOL}' for 'sm_80'
ptxas info    : Function properties for {BACKWARD_SYMBOL}
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 186 registers, used 1 barriers, 16 bytes cumulative stack size, 32 bytes smem, 1464 bytes cmem[0]
ptxas info    : Function properties for a_function_that_it_calls
    24 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '{FINISH_SYMBOL}' for 'sm_80'
ptxas info    : Function properties for {FINISH_SYMBOL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
ptxas info    : Compile time = 31.271 ms
"""
USAGE = f"""Resource usage:
 Common:
  GLOBAL:0
 Function {BACKWARD_SYMBOL}:
  REG:183 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[2]:192 CONSTANT[0]:2008 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {FINISH_SYMBOL}:
  REG:32 STACK:0 SHARED:1056 LOCAL:0 CONSTANT[0]:1632 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""\tcode for sm_90
\t\tFunction : {BACKWARD_SYMBOL}
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/                   LDSM.16.M88.4 R4, [R8] ;                 /* 0x000000000804783b */
        /*0020*/                   HMMA.1688.F32.TF32 R12, R4, R20, R12 ;   /* 0x000000140000c23c */
        /*0030*/              @!P0 HMMA.16816.F32 R12, R4, R20, RZ ;        /* 0x000000140000c23c */
\t\tFunction : {FINISH_SYMBOL}
        /*0000*/                   EXIT ;                                   /* 0x000000000000794d */
"""


@pytest.fixture(scope="module")
def stored() -> resources.Table:
    table: resources.Table = json.loads(STORED.read_text(encoding="utf-8"))
    return table


def built_module() -> Path:
    """The module of the install, where it is as new as the sources; else the test is skipped."""
    found = importlib.util.find_spec("semeda_fast._C_cuda")
    if found is None or not found.origin:
        pytest.skip("semeda_fast._C_cuda is not built here; `make test CUDA_ARCHS=90` builds it, where there is nvcc")
    module = Path(found.origin)
    sources = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.c*")]
    newer = [path.name for path in sources if path.stat().st_mtime > module.stat().st_mtime]
    if newer:
        pytest.skip(f"{module.name} is older than {', '.join(sorted(newer))}; `make test` builds it anew")
    return module


def test_the_built_module_is_as_the_table_says(stored: resources.Table) -> None:
    module = built_module()
    try:
        rows, release = resources.read_module(module)
    except resources.ToolError as error:
        pytest.skip(f"the module cannot be read: {error}")
    assert list(rows) == list(resources.KERNELS)
    assert len({tuple(row) for row in rows.values()}) == 1  # all kernels for the same architectures
    known = {
        name: {key: row[key] for key in row if int(key[3:]) in resources.ARCHITECTURES} for name, row in rows.items()
    }
    problems = [text for name, row in rows.items() for one in row.values() for text in resources.wrong(name, one)]
    assert problems == []
    assert resources.worse(known, stored["kernels"], False, release == stored["nvcc"]) == []
    if cuda_plan.find_compiler():
        assert resources.plan_launches(known)[1] == []


def test_the_kernels_of_the_default_proxy_compile_as_the_table_says() -> None:
    """In every run where there is nvcc; `make test` builds no more of the kernels without a GPU."""
    try:
        resources.nvcc.find_nvcc()
    except resources.nvcc.CudaBuildError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    command = [sys.executable, str(SCRIPT), "--quick", "--jobs", "1", "--check", str(STORED)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"^2 compiled, \d+ planned, 0 problems$", found.stdout, re.MULTILINE), found.stdout
    for kernel in ("forward default half", "backward default half"):
        assert kernel in found.stdout


@pytest.mark.skipif(not FULL, reason="minutes; SEMEDA_FAST_AOT=full asks for it")
@pytest.mark.timeout(3600)
def test_nothing_spills_or_got_worse_on_any_architecture() -> None:
    command = [sys.executable, str(SCRIPT), "--check", str(STORED)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    problems = [line for line in found.stdout.splitlines() if line.startswith("PROBLEM")]
    assert found.returncode == 0, "\n".join(problems) or found.stderr
    count = len(resources.KERNELS) * len(resources.ARCHITECTURES)
    assert re.search(rf"^{count} compiled, \d+ planned, 0 problems$", found.stdout, re.MULTILINE)


def test_the_stored_table_is_sound_and_complete(stored: resources.Table) -> None:
    assert set(stored) == {"nvcc", "kernels", "launches"}
    assert re.fullmatch(r"\d+\.\d+", stored["nvcc"])
    assert list(stored["kernels"]) == list(resources.KERNELS)
    architectures = [f"sm_{a}" for a in resources.ARCHITECTURES]
    assert architectures == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    fields = {field.name for field in dataclasses.fields(resources.Resources)}
    for name, row in stored["kernels"].items():
        assert list(row) == architectures, name
        for one in row.values():
            assert set(one) == fields
            assert resources.wrong(name, one) == []
            assert one["stack"] == one["spills"] == one["shared"] == 0
            assert one["products"] is not None
    for name, row in stored["launches"].items():
        assert list(row) == architectures, name
        for architecture, launch in row.items():
            assert (
                set(launch) == {"refused"}
                or launch["shared"] <= cuda_plan.DEVICES[int(architecture[3:])].shared_per_block
            )
    proxies, numbers = len(cuda_plan.PROXIES), 2
    assert len(stored["launches"]) == len(cuda_plan.DATASETS) * len(resources.DIRECTIONS) * proxies * numbers


def test_every_proxy_runs_in_half_precision_where_shared_memory_is_large(stored: resources.Table) -> None:
    """On sm_80, sm_90 and sm_100; and the default proxy everywhere, in every kind of numbers."""
    for name, row in stored["launches"].items():
        kernel = name.split("/")[1]
        refused = {int(architecture[3:]) for architecture, launch in row.items() if "refused" in launch}
        if kernel.split(" ")[1] == "default":
            assert not refused, name
        if kernel.endswith("half"):
            assert not refused & {80, 90, 100}, name


@needs_compiler
def test_plans_are_as_stored(stored: resources.Table) -> None:
    """A change of plan.cpp that is meant wants the table written anew with --launches."""
    launches, problems = resources.plan_launches(stored["kernels"])
    assert problems == []
    assert cuda_plan.worse_launches(launches, stored["launches"], True) == []
    assert launches == stored["launches"]


@needs_compiler
def test_registers_that_do_not_leave_room_for_the_planned_blocks_are_found(
    stored: resources.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads(json.dumps(stored))
    stored["launches"] = resources.plan_launches(stored["kernels"])[0]
    stored["kernels"][FORWARD]["sm_90"]["registers"] = 136  # two blocks of 256 threads have 128 each
    resources.write(tmp_path / "table.json", stored)
    assert resources.main(["--launches", "--check", str(tmp_path / "table.json")]) == 1
    output = capsys.readouterr().out
    for dataset in cuda_plan.DATASETS:
        assert f"PROBLEM {dataset}/{FORWARD} sm_90: planned for 2 blocks a multiprocessor, registers allow 1" in output
        assert f"PROBLEM {dataset}/{FORWARD} sm_90: 1 blocks a multiprocessor, were 2" in output
    assert "0 compiled, " in output
    assert ", 4 problems" in output


@needs_compiler
def test_the_program_that_asks_for_plans_refuses_half_a_line() -> None:
    with pytest.raises(RuntimeError, match="a bad line: 132 232448 233472 16 21 513 513 1 0 3 16 32"):
        cuda_plan.ask("132 232448 233472 16 21 513 513 1 0 3 16 32\n")


@needs_compiler
def test_a_proxy_that_no_kernel_knows_is_refused_by_the_plan() -> None:
    known, other = cuda_plan.ask(
        "132 232448 233472 16 21 513 513 1 0 3 16 32 2\n132 232448 233472 16 21 513 513 1 0 2 24 2\n"
    )
    assert known["rows"] > 0
    assert "this one is another" in other["refused"]


def test_names_of_kernels() -> None:
    assert resources.readable(BACKWARD_SYMBOL) == "backward four-layer tf32"
    half = BACKWARD_SYMBOL.replace("_16_backward_tf32_cu", "_16_backward_half_cu")
    assert resources.readable(half) == "backward four-layer half"
    deep = half.replace("Li16ELi32ELi32ELi2E", "Li16ELi32ELi32ELi32ELi32ELi32ELi16E").replace("backward", "forward")
    assert resources.readable(deep) == "forward deep half"
    assert resources.readable(half.replace("ELi2EEEE", "ELi4EEEE")) == "backward 16-32-32-4 half"
    assert resources.readable(PREPARE_SYMBOL.format("6Tf32x3")) == "prepare tf32"
    assert resources.readable(PREPARE_SYMBOL.format("4Half")) == "prepare half"
    assert resources.readable(FINISH_SYMBOL) == "finish"
    with pytest.raises(resources.ResourcesError, match=r"expected a symbol \.\.\._kernel, got '_Z4mainv'"):
        resources.readable("_Z4mainv")


def test_what_ptxas_prints() -> None:
    assert resources.parse_ptxas(PTXAS) == {
        BACKWARD_SYMBOL: resources.Resources(registers=186, stack=40, spills=24, shared=32),
        FINISH_SYMBOL: resources.Resources(registers=32, stack=0, spills=0, shared=0),
    }
    assert resources.parse_ptxas("ptxas info    : 0 bytes gmem") == {}
    with pytest.raises(resources.ResourcesError, match="ptxas prints something new"):
        resources.parse_ptxas(PTXAS.replace("Used 186", "It takes 186"))


def test_what_cuobjdump_prints() -> None:
    found = resources.parse_usage(USAGE, 90)
    assert found == {
        BACKWARD_SYMBOL: resources.Resources(registers=183, stack=24, spills=0, shared=0),
        FINISH_SYMBOL: resources.Resources(registers=32, stack=0, spills=0, shared=32),
    }
    assert resources.parse_usage(USAGE, 80)[FINISH_SYMBOL].shared == 1056  # sm_80 counts no bytes of the system
    assert resources.count_instructions(SASS) == {BACKWARD_SYMBOL: (2, 1), FINISH_SYMBOL: (0, 0)}


def test_rows_of_several_architectures() -> None:
    one = {FINISH_SYMBOL: GOOD, BACKWARD_SYMBOL: GOOD}
    rows = resources.as_rows([(120, one), (80, one)])
    assert list(rows) == ["backward four-layer tf32", "finish"]  # in the table's order
    assert rows["finish"] == {"sm_80": dataclasses.asdict(GOOD), "sm_120": dataclasses.asdict(GOOD)}
    assert list(rows["finish"]) == ["sm_80", "sm_120"]
    with pytest.raises(resources.ResourcesError, match="two kernels are 'finish'"):
        resources.as_rows([(80, one), (80, one)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spills": 8}, "spills 8 B"),
        ({"stack": 16}, "16 B of local memory"),
        ({"shared": 32}, "32 B of static shared memory"),
        ({"registers": 8}, "nothing is left of it: 8 registers"),
        ({"products": 0}, "no tensor-core product is left in it"),
        ({"matrix_loads": 0}, "no ldmatrix is left in it"),
    ],
)
def test_what_is_wrong_by_itself(change: dict[str, int], text: str) -> None:
    good = dataclasses.asdict(GOOD)
    assert resources.wrong(FORWARD, good) == []
    assert resources.wrong(FORWARD, good | {"products": None, "matrix_loads": None}) == []  # no cuobjdump
    (problem,) = resources.wrong(FORWARD, good | change)
    assert text in problem


def test_only_the_main_kernels_need_products() -> None:
    assert resources.wrong("finish", dataclasses.asdict(GOOD) | {"products": 0, "matrix_loads": 0}) == []
    (problem,) = resources.wrong("forward 8-2 half", dataclasses.asdict(GOOD))
    assert "none of the kernels" in problem


def test_what_got_worse() -> None:
    def table(registers: int) -> dict[str, resources.Row]:
        return {FORWARD: {"sm_90": dataclasses.asdict(GOOD) | {"registers": registers}}}

    assert resources.worse(table(128), table(120), True, True) == []
    assert resources.worse(table(129), table(120), True, True) == [f"{FORWARD} sm_90: 129 registers, were 120"]
    assert resources.worse(table(129), table(120), True, False) == []  # another nvcc
    assert "no longer compiled" in resources.worse({}, table(120), True, True)[0]
    assert resources.worse({}, table(120), False, True) == []  # a part of the table
    assert "not in the stored table" in resources.worse(table(120), {}, False, False)[0]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "blocks"),
    [
        # By hand from the programming guide: registers of a warp in units of 256, a quarter of the warps each.
        (80, 128, 48 << 10, {"shared memory": 3, "registers": 2, "warps": 8}),
        (80, 129, 0, {"shared memory": 164, "registers": 1, "warps": 8}),
        (86, 40, 99 << 10, {"shared memory": 1, "registers": 6, "warps": 6}),
        (90, 32, 113 << 10, {"shared memory": 2, "registers": 8, "warps": 8}),
        (90, 72, (113 << 10) + 1, {"shared memory": 1, "registers": 3, "warps": 8}),
        (120, 255, 49 << 10, {"shared memory": 2, "registers": 1, "warps": 6}),
    ],
)
def test_blocks_of_a_multiprocessor(architecture: int, registers: int, shared: int, blocks: dict[str, int]) -> None:
    assert cuda_plan.residency(cuda_plan.DEVICES[architecture], registers, shared, 8) == blocks


def test_a_row_of_a_launch() -> None:
    row = cuda_plan.launch_row(QUERY, PLAN, 128)
    assert row == {
        "tile": "20x28", "shared": 105_920, "resident": True, "blocks": 2, "limit": "shared memory", "warps": 16,
        "occupancy": 0.25,
    }  # fmt: skip
    assert cuda_plan.launch_row(QUERY, PLAN._replace(shared=40_000), 96)["limit"] == "registers"
    alone = cuda_plan.launch_row(QUERY, PLAN._replace(shared=40_000, blocks=1), 96)
    assert (alone["limit"], alone["blocks"], alone["occupancy"]) == ("plan", 1, 0.125)
    assert cuda_plan.launch_row(QUERY, cuda_plan.Plan(refused="too large"), 0) == {"refused": "too large"}
    assert cuda_plan.describe("voc/x", {"sm_90": row}) == (
        "voc/x: sm_90: 20x28, 105920 B, weights resident, 2 blocks (shared memory), 25.0%"
    )
    assert cuda_plan.describe("voc/x", {"sm_80": {"refused": "too large"}}) == "voc/x: refused: too large"


def test_what_is_wrong_with_a_launch() -> None:
    def problems(plan: cuda_plan.Plan, registers: int) -> list[str]:
        return cuda_plan.wrong_launch(QUERY, plan, cuda_plan.launch_row(QUERY, plan, registers))

    assert problems(PLAN, 128) == []
    assert problems(cuda_plan.Plan(refused="too large"), 128) == []
    assert problems(PLAN, 136) == ["planned for 2 blocks a multiprocessor, registers allow 1"]
    assert problems(PLAN._replace(blocks=1, shared=(227 << 10) + 4), 128) == [
        "232452 B of shared memory, a block has 232448"
    ]


def test_launches_that_differ_from_the_stored_ones() -> None:
    def table(**changes: Any) -> dict[str, cuda_plan.Row]:
        return {"voc/x": {"sm_90": cuda_plan.launch_row(QUERY, PLAN, 128) | changes}}

    def problem(now: dict[str, cuda_plan.Row]) -> str:
        (text,) = cuda_plan.worse_launches(now, table(), True)
        return text

    assert cuda_plan.worse_launches(table(), table(), True) == []
    assert problem(table(blocks=1)) == "voc/x sm_90: 1 blocks a multiprocessor, were 2"
    assert problem({"voc/x": {"sm_90": {"refused": "no"}}}) == "voc/x sm_90: 0 blocks a multiprocessor, were 2"
    assert "20x12" in problem(table(tile="20x12"))
    assert "no longer planned" in problem({})
    assert cuda_plan.worse_launches({}, table(), False) == []
    assert "not in the stored table" in cuda_plan.worse_launches(table(), {}, True)[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--quick", "--write", "table.json"], "--write stores the whole table"),
        (["--module", "x.so", "--write", "table.json"], "--write stores the whole table"),
        (["--launches"], "--launches takes registers from the table"),
        (["--launches", "--arch", "90", "--check", "table.json"], "--launches takes registers from the table"),
    ],
)
def test_bad_calls(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as found:
        resources.main(arguments)
    assert found.value.code == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_cuobjdump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(resources, "find_cuobjdump", lambda: "")
    assert resources.main(["--module", str(tmp_path / "x.so")]) == 2
    assert "no cuobjdump was found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resources.main(["--write", str(tmp_path / "table.json")])
    assert "--write needs cuobjdump" in capsys.readouterr().err
    assert resources.with_instructions({FINISH_SYMBOL: GOOD}, tmp_path / "x.cubin") == {FINISH_SYMBOL: GOOD}


def test_writing_and_reading_the_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    row = {"sm_90": dataclasses.asdict(GOOD)}
    table: resources.Table = {"nvcc": "13.0", "kernels": {"a": row, "b": row}, "launches": {"voc/a": row}}
    resources.write(path, table)
    resources.write(path, table)  # replaced
    assert json.loads(path.read_text(encoding="utf-8")) == table
    assert len(path.read_text(encoding="utf-8").splitlines()) == 10
