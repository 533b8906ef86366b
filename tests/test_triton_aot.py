"""What the compiler makes of the kernels on sm_80, sm_90 and sm_100, against tests/triton_resources.json.

Ahead of time, so without a GPU, in a process without TRITON_INTERPRET and with an empty cache. `make test` compiles the
launches that matter most; SEMEDA_FAST_AOT=full compiles all, in about 3 minutes. After a change that is meant:

    python -m semeda_fast.kernels.aot --write tests/triton_resources.json
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

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here", allow_module_level=True)

from semeda_fast.kernels import aot
from semeda_fast.kernels.launch import Launch

STORED = Path(__file__).with_name("triton_resources.json")
FULL = os.environ.get("SEMEDA_FAST_AOT", "") == "full"
GOOD = aot.Resources(registers=120, spills=0, stack=0, shared=40_000, products="wgmma", stores=8)


def compiled(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton compiles, one thread, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1200 if FULL else 300)
def test_nothing_spills_or_got_worse(tmp_path: Path) -> None:
    part = [] if FULL else ["--quick"]
    found = compiled(tmp_path, ["-m", "semeda_fast.kernels.aot", *part, "--check", str(STORED)])
    problems = [line for line in found.stdout.splitlines() if line.startswith("PROBLEM")]
    assert found.returncode == 0, "\n".join(problems) or found.stderr
    count = int(re.search(r"^(\d+) compiled, 0 problems$", found.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert count > (300 if FULL else 25)
    assert (tmp_path / "cache").is_dir()  # it compiled, rather than read what was there


SEEDED = """
import sys
from semeda_fast.kernels import aot, plan
plan.LAYER_BWD_FP32[64] = plan.LaunchConfig(2, 32, 8, 3)
rows, problems = aot.compile_table({80: ("^wide-fp32/.*layer_bwd 64-64",)})
print(len(rows), *problems, sep="|")
"""


def test_a_configuration_that_spills_is_found(tmp_path: Path) -> None:
    """64 pixels of the widest fp32 layer backward, which is why the table has 32."""
    found = compiled(tmp_path, ["-c", SEEDED])
    assert found.returncode == 0, found.stderr
    count, *problems = found.stdout.splitlines()[-1].split("|")
    assert count == "1"
    assert len(problems) == 1
    assert re.search(r"layer_bwd 64-64 sm_80: spills \d+ B, \d+ B of local memory", problems[0])


def test_the_stored_table_is_sound_and_complete() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert set(stored) == {"triton", "launches"}
    fields = {field.name for field in dataclasses.fields(aot.Resources)}
    assert len(stored["launches"]) > 80
    for name, row in stored["launches"].items():
        assert set(row) == {"config", *(f"sm_{a}" for a in aot.ARCHITECTURES)}, name
        for architecture in aot.ARCHITECTURES:
            resources = row[f"sm_{architecture}"]
            assert set(resources) == fields
            assert resources["spills"] == resources["stack"] == 0
            assert resources["shared"] <= aot.SHARED_LIMIT[architecture]
    for names in aot.QUICK.values():
        assert any(re.search(names, name) for name in stored["launches"])
    kernels = {name.split("/")[1].split()[1] for name in stored["launches"]}
    assert kernels == {
        "prepare", "softmax_fwd", "tile_class", "layer_fwd", "layer_bwd", "logits_bwd", "sum", "finish"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spills": 8}, "spills 8 B"),
        ({"stack": 16}, "16 B of local memory"),
        ({"shared": (227 << 10) + 1}, "232449 B of shared memory, a block has 232448"),
        ({"products": "mma"}, "products by 'mma', expected 'wgmma'"),
        ({"products": ""}, "products by 'nothing', expected 'wgmma'"),
        ({"registers": 4}, "nothing is left of it: 4 registers"),
        ({"stores": 0}, "nothing is left of it: 120 registers, 0 global stores"),
    ],
)
def test_what_is_wrong_by_itself(change: dict[str, int | str], text: str) -> None:
    assert aot.wrong(GOOD, 90, "wgmma") == []
    (problem,) = aot.wrong(dataclasses.replace(GOOD, **change), 90, "wgmma")  # type: ignore[arg-type]
    assert text in problem


@pytest.mark.parametrize("change", [{"registers": 129}, {"shared": 44_001}])
def test_what_got_worse(change: dict[str, int]) -> None:
    def table(**fields: int) -> dict[str, aot.Row]:
        resources = dataclasses.asdict(dataclasses.replace(GOOD, **fields))  # type: ignore[arg-type]
        return {"default/05 layer_fwd": {"config": "4x32", "sm_90": resources}}

    stored = table()
    assert aot.worse(table(registers=128, shared=44_000), stored, True, True) == []
    (problem,) = aot.worse(table(**change), stored, True, True)
    assert problem.startswith("default/05 layer_fwd sm_90: ")
    assert ("120" if "registers" in change else "40000") in problem
    assert aot.worse(table(**change), stored, True, False) == []  # another Triton
    assert "no longer launched" in aot.worse({}, stored, True, True)[0]
    assert aot.worse({}, stored, False, True) == []  # a part of the table
    assert "not in the stored table" in aot.worse(stored, {}, False, True)[0]


def test_the_unit_expected_depends_on_pixels_and_architecture() -> None:
    def expected(architecture: int, rows: int) -> str:
        return aot.expected_products(
            Launch(None, 1, {"KSIZE": 3, "BLOCK_H": rows, "BLOCK_W": 32}), architecture
        )  # fmt: skip

    assert [expected(a, 2) for a in aot.ARCHITECTURES] == ["mma", "wgmma", "tcgen05"]
    assert [expected(a, 1) for a in aot.ARCHITECTURES] == ["mma", "mma", "mma"]
    assert aot.expected_products(Launch(None, 1, {"BLOCK_H": 4, "BLOCK_W": 32}), 90) == ""


def test_it_refuses_the_interpreter_and_a_partial_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        aot.main(["--quick", "--write", str(tmp_path / "table.json")])
    assert "--write stores the whole table" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


def test_writing_and_reading_the_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows: dict[str, aot.Row] = {"a": {"config": "4x32", "sm_90": dataclasses.asdict(GOOD)}, "b": {"config": ""}}
    aot.write(path, rows)
    aot.write(path, rows)  # replaced
    assert json.loads(path.read_text())["launches"] == rows
    assert len(path.read_text().splitlines()) == 7
