"""gpu.md of a folder that `make gpu` filled: from session.json, tests.json, results.json, layers.json and tiles.json,
as far as they are there. `python -m benchmarks.gpu.report DIR` writes it anew; files of split calls may be put into
one folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semeda_fast.files import atomic_path

from ..report import tables
from ..report.tables import BASELINE_FAMILIES, Record, markdown, number, ratio_text
from ..suite import runner
from ..suite.runner import Run
from ..timing import Ratio, paired_ratio, quartiles
from . import layers as gpu_layers
from . import tests as gpu_tests
from . import tiles as gpu_tiles
from .session import SESSION

REPORT = "gpu.md"
# What a ratio is taken of: key of the samples, and how the column calls it.
MEASURES = {"seconds": "device idle before the call", "queued_seconds": "launches queued ahead"}


def write_report(folder: Path) -> Path:
    """Write gpu.md into `folder`, in the place of an earlier one; returns its path.

    Raises:
        FileNotFoundError: the folder holds none of the files.
        ValueError: one of them is not what its name says.
    """
    names = (SESSION, gpu_tests.RESULTS, gpu_layers.RESULTS, gpu_tiles.RESULTS)
    loaded = [_load(folder / name) for name in names]
    session, tests, layers, tiles = loaded
    run = runner.load_run(folder) if (folder / runner.RESULTS).is_file() else None
    if run is None and not any(loaded):
        raise FileNotFoundError(f"{folder} holds none of {', '.join((*names, runner.RESULTS))}; run make gpu first")
    machines = [part["machine"] for part in loaded if part] + ([run.machine] if run else [])
    gpus = list(dict.fromkeys(str(facts.get("gpu")) for facts in machines))
    if len(gpus) > 1:
        raise ValueError(f"{folder} holds results of different devices: {', '.join(gpus)}; keep a folder for each")
    parts = [f"# semeda_fast on {gpus[0]}\n"]
    parts += [_machine(machines), _phases(session), _tests(tests), *_bench(run), _layers(layers)]
    parts += [_backends(tiles), _tiles(tiles), _how()]
    path = folder / REPORT
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data["machine"], dict):
            return dict(data)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no result of make gpu: expected JSON with a 'machine'; remove the file")


def _machine(machines: Sequence[dict[str, Any]]) -> str:
    facts: dict[str, Any] = {}
    for found in machines:
        facts.update({key: value for key, value in found.items() if value is not None})
    titles = {
        "gpu": "device",
        "capability": "compute capability",
        "multiprocessors": "multiprocessors",
        "torch": "torch",
        "cuda": "CUDA of torch",
        "cudnn": "cuDNN",
        "triton": "Triton",
        "python": "Python",
        "processor": "host processor",
        "cores": "host cores",
        "commit": "commit",
    }
    rows = [[title, str(facts[key])] for key, title in titles.items() if facts.get(key)]
    if "gpu_memory_bytes" in facts:
        rows.insert(1, ["device memory", f"{facts['gpu_memory_bytes'] / 2**30:.0f} GiB"])
    return "## Machine\n\n" + markdown(["", "value"], rows)


def _phases(session: dict[str, Any] | None) -> str:
    if session is None:
        return ""
    rows = [
        [phase["name"], phase["state"], f"{phase['seconds']:.0f}", f"{phase['limit']:.0f}", phase["problem"]]
        for phase in session["phases"].values()
    ]
    text = "## Phases\n\n" + markdown(["phase", "state", "s", "limit, s", ""], rows)
    return text + "".join(f"\n* {note}" for note in session["notes"]) + ("\n" if session["notes"] else "")


def _tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return ""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests["counts"].items() if count) or "none"
    parts = [f"## Tests\n\n{counts}.\n"]
    rows = []
    for suite in tests["suites"]:
        outcomes = [test["outcome"] for test in suite["tests"]]
        cells = [str(outcomes.count(outcome)) for outcome in gpu_tests.OUTCOMES]
        rows.append([suite["name"], suite["state"], *cells, f"{suite['seconds']:.0f}", suite["problem"]])
    parts.append(markdown(["tests", "state", *gpu_tests.OUTCOMES, "s", ""], rows))
    listed = [(suite["name"], test) for suite in tests["suites"] for test in suite["tests"]]
    bad = [f"* `{t['name']}` ({t['outcome']}): {_last_line(t['reason'])}" for _, t in listed if _is_bad(t)]
    if bad:
        parts.append("Failed:\n\n" + "\n".join(bad) + "\n")
    waiting = [f"* `{t['name']}`" for _, t in listed if t["outcome"] == "not run"]
    waiting += [f"* all of {name}" for name in tests["left_out"]]
    if waiting:
        parts.append("Not run, the time was up:\n\n" + "\n".join(waiting) + "\n")
    skipped = dict.fromkeys(_last_line(t["reason"]) for _, t in listed if t["outcome"] == "skipped")
    if skipped:
        parts.append("Reasons of the skipped ones:\n\n" + "\n".join(f"* {reason}" for reason in skipped) + "\n")
    return "\n".join(parts)


def _is_bad(test: dict[str, Any]) -> bool:
    return test["outcome"] in ("failed", "error")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].replace("|", "\\|")[:300] if lines else ""


def _bench(run: Run | None) -> list[str]:
    if run is None:
        return []
    parts = ["## Benchmarks\n"]
    wrong = [record for record in run.records if record["status"] in ("wrong", "failed")]
    if wrong:
        lines = [f"* `{r.get('contender')}` on {r.get('workload_name')}: {tables.verdict(r)}" for r in wrong]
        parts.append("Wrong or failed, so without a time:\n\n" + "\n".join(lines) + "\n")
    for kind in ("headline", "workloads"):
        for records in tables.groups(run.records, kind).values():
            parts.append(f"### {records[0]['workload_name']}, forward + backward\n")
            parts.append(_labels(records[0]["labels"]) + "\n")
            parts.append(markdown(*time_table(records)))
            header, rows = ratio_table(records)
            parts.append(markdown(header, rows) if rows else "")
    memory = [record for record in run.records if record["kind"] == "memory"]
    for name in dict.fromkeys(record["workload_name"] for record in memory):
        chosen = [record for record in memory if record["workload_name"] == name]
        parts.append(f"### Memory of {name}, as torch's allocator counts it\n")
        parts.append(markdown(*tables.memory_table(chosen)))
    held = [record for record in run.records if record["kind"] == "step-memory"]
    for records in tables.groups(run.records, "steps").values():
        some = records[0]
        parts.append(f"### A training step of {some['title_network']}, {some['workload_name']}, bf16 autocast\n")
        parts.append(markdown(*tables.step_table(records, held)))
    peaks = next((r for r in run.records if r["kind"] == "peaks" and r["status"] == "ok"), None)
    if peaks:
        text = f"Peaks found: {peaks['fma_flops'] / 1e12:.3g} TFLOP/s ({peaks['fma_how']}), "
        half = f"{peaks['half_flops'] / 1e12:.3g} TFLOP/s (the same in bf16), " if "half_flops" in peaks else ""
        parts.append(f"{text}{half}{peaks['copy_bytes'] / 1e9:.3g} GB/s ({peaks['copy_how']}, read + write).\n")
    rows = [[p["name"], p["state"], f"{p['seconds']:.0f}", p.get("problem", "")] for p in run.plans]
    return [*parts, markdown(["plan", "state", "s", "why"], rows)]


def _labels(facts: dict[str, Any]) -> str:
    """As in report.py, which draws, and so needs matplotlib."""
    note = f" {facts['note']}." if facts["note"] else ""
    shares = ", ".join(f"{100 * facts[key]:.1f} %" for key in ("edge_share", "mixed_share", "void_share"))
    return (
        f"Labels: {facts['source']}; shares of pixels with more than one label in 3x3, with more than one in the "
        f"proxy's receptive field, and void: {shares}.{note}"
    )


def time_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Rows of contenders: both measures, the first call, what autograd saves."""
    times = (f"ms [quartiles], {title}" for title in MEASURES.values())
    header = ["contender", *times, "first call, s", "saved B/pixel"]
    rows = []
    for record in records:
        first, saved = record.get("first_call_seconds"), record.get("saved_bytes_per_pixel")
        rows.append(
            [
                f"{record['title']} (`{record['contender']}`)",
                tables.milliseconds(record),
                _milliseconds(record["queued_seconds"]) if record.get("queued_seconds") else "",
                "" if first is None else number(first),
                "" if saved is None else number(saved),
            ]
        )
    return header, rows


def _milliseconds(seconds: Sequence[float]) -> str:
    q1, median, q3 = (1000 * value for value in quartiles(seconds))
    return f"{number(median)} [{number(q1)}, {number(q3)}]"


def ratio_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Rows "baseline / backend", each by the fastest of its family; one column a measure."""
    header = ["times of", *MEASURES.values()]
    rows = []
    families = dict.fromkeys(record["family"] for record in records if record["fused"])
    for family in families:
        for baseline, title in BASELINE_FAMILIES.items():
            cells = [_ratio(records, baseline, family, measure) for measure in MEASURES]
            if any(cells):
                rows.append([f"{title} / {family}", *cells])
    return header, rows


def _ratio(records: Sequence[Record], baseline: str, family: str, measure: str) -> str:
    found: list[Record] = []
    for wanted in (baseline, family):
        able = [r for r in records if r["family"] == wanted and r["status"] == "ok" and measure in r]
        if not able:
            return ""
        found.append(min(able, key=lambda record: quartiles(record[measure])[1]))
    ratio: Ratio = paired_ratio(found[0][measure], found[1][measure])
    return f"{ratio_text(ratio)} (`{found[0]['contender']}` / `{found[1]['contender']}`)"


def _layers(layers: dict[str, Any] | None) -> str:
    if layers is None:
        return ""
    parts = ["## Layers\n", "Forward is the prediction branch of a layer, dgrad the gradient towards its input.\n"]
    records = layers["records"]
    for proxy in dict.fromkeys(record["proxy"] for record in records):
        chosen = [record for record in records if record["proxy"] == proxy]
        size = "x".join(map(str, chosen[0]["size"]))
        parts.append(f"### {proxy} proxy, {chosen[0]['dtype']}, {size}\n")
        parts.append(markdown(*layer_table(chosen)))
    return "\n".join([*parts, *(f"* {note}" for note in layers["notes"])]) + "\n"


def layer_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Rows of layers and contenders: median and quartiles, achieved GB/s and TFLOP/s; the fastest whole form is marked.

    cuDNN's bare convolution does less than the others, so it cannot win.
    """
    header = ["layer", "contender", "ms [quartiles]", "GB/s", "TFLOP/s", ""]
    rows = []
    for name in dict.fromkeys(record["name"] for record in records):
        line = [record for record in records if record["name"] == name]
        whole = [r for r in line if r["status"] == "ok" and r["contender"] != gpu_layers.CONVOLUTION]
        best = min(whole, key=lambda record: quartiles(record["seconds"])[1]) if len(whole) > 1 else None
        for record in line:
            if record["status"] != "ok":
                rows.append([name, record["contender"], tables.verdict(record), "", "", ""])
                continue
            median = quartiles(record["seconds"])[1]
            rows.append(
                [
                    name,
                    record["contender"],
                    _milliseconds(record["seconds"]),
                    number(record["bytes"] / median / 1e9),
                    number(record["flop"] / median / 1e12),
                    "fastest" if record is best else "",
                ]
            )
    return header, rows


def _backends(tiles: dict[str, Any] | None) -> str:
    if tiles is None:
        return ""
    records = tiles["comparisons"]
    timed = [record["queued"]["gain"][1] for record in records if "queued" in record]
    faster = sum(gain > 1 for gain in timed)
    parts = [
        "## cuda against triton\n",
        "This table decides which of the two `auto` prefers: the order in backends/registry.py. Forward and "
        "backward of the loss; above 1 cuda is faster. "
        f"With launches queued it was in {faster} of {len(timed)} workloads.\n",
        markdown(*backend_table(records)),
    ]
    return "\n".join(parts)


def backend_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Rows of workloads: both backends' times and their ratio, for an idle device and for launches queued ahead."""
    header = ["workload"]
    for measure in gpu_tiles.MEASURES:
        header += [f"{measure}: {name}, ms [quartiles]" for name in gpu_tiles.BACKENDS]
        header.append(f"{measure}: triton / cuda [quartiles]")
    rows = []
    for record in records:
        row = [record["case"]]
        for measure in gpu_tiles.MEASURES:
            found = record.get(measure)
            row += [_spread(found["seconds"]), _spread(found["triton"]), _gain(found)] if found else ["", "", ""]
        if record["status"] != "ok":
            row[1] = tables.verdict(record)
        rows.append(row)
    return header, rows


def _spread(seconds: Sequence[float]) -> str:
    """Of quartiles, as `_milliseconds` of samples."""
    q1, median, q3 = (number(1000 * value) for value in seconds)
    return f"{median} [{q1}, {q3}]"


def _gain(found: Record) -> str:
    q1, median, q3 = found["gain"]
    return ratio_text(Ratio(median, q1, q3))


def _tiles(tiles: dict[str, Any] | None) -> str:
    if tiles is None:
        return ""
    parts = ["## Tiles of the CUDA kernels\n"]
    records = tiles["tiles"]
    timed = {f"{record['direction']} of {record['case']}": found for record in records if (found := _best(record))}
    if timed:
        worst = max(timed, key=lambda name: timed[name]["gain"][1])
        share = 100 * (timed[worst]["gain"][1] - 1)
        parts.append(f"The planner's choice is within {share:.1f} % of the best; furthest off: {worst}.\n")
    labels = [record["labels"] for record in records if "labels" in record]
    if labels:
        shares = [f"{100 * choose(found['edge_share'] for found in labels):.1f}" for choose in (min, max)]
        parts.append(f"Labels: {labels[0]['source']}; {' to '.join(shares)} % of the pixels lie at an edge.\n")
    parts.append(markdown(*tile_table(records)) if records else "")
    for record in records:
        for tile in record.get("tiles", ()):
            if tile["status"] in ("wrong", "failed"):
                where = f"{record['direction']} of {record['case']}, tile {tile['tile']}"
                parts.append(f"* {where}: {tables.verdict(tile)}")
    return "\n".join([*parts, *(f"* {note}" for note in tiles["notes"])]) + "\n"


def _best(record: Record) -> Record | None:
    return next(iter(gpu_tiles.ranked(record)), None)


def tile_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Rows of directions: the planner's tile, the best found, their ratio, the five fastest, how many were timed."""
    header = ["workload", "direction", "planner's choice", "ms [quartiles]", "best found", "ms [quartiles]"]
    header += [
        "planner's / best [quartiles]",
        f"the {gpu_tiles.TOP} fastest, planner's / each",
        "tiles timed of fitting",
    ]
    rows = []
    for record in records:
        row = [record["case"], record["direction"]]
        best = _best(record)
        if best is None:
            rows.append([*row, tables.verdict(record) if "reason" in record else "not timed", *[""] * 6])
            continue
        planned, tiles = record["tiles"][0], record["tiles"]
        fastest = gpu_tiles.ranked(record)[: gpu_tiles.TOP]
        done = sum(tile["status"] == "ok" for tile in tiles)
        row += [planned["tile"], _spread(planned["seconds"]), best["tile"], _spread(best["seconds"]), _gain(best)]
        row.append(", ".join(f"{tile['tile']} {number(tile['gain'][1])}x" for tile in fastest))
        note = f"; {tables.verdict(record)}" if record["status"] != "ok" else ""
        rows.append([*row, f"{done} of {len(tiles)}{note}"])
    return header, rows


def _how() -> str:
    return """## How it was measured

* Contenders of one table ran in one process, round-robin, between CUDA events; medians with quartiles, ratios of
  medians with 95 % bootstrap intervals over rounds, by the faster layout of each side.
* Idle: the device waits for each call's launches, so Python's time shows where kernels are short. Queued: the device
  is kept busy until the whole call is queued, as in a training step that runs ahead of the device.
* Each contender was compared with the reference in float64 on the whole workload before it was timed.
* cuDNN chose its fastest algorithms (`cudnn.benchmark`) for all while times were taken. fp32 logits were computed
  without TF32, which keeps 10 bits; with half-precision logits the plain reference has TF32, torch's default, eager and
  compiled, and is judged by what is allowed under autocast, which rounds operands, too.
* Layers: GB/s count each operand of that contender once, TFLOP/s the dense convolution. cuDNN is a bare convolution
  with bias (dgrad: without), which does less than the other two; the compiled epilogue writes a byte of codes a
  feature, ours packs 2 to 3 bits.
* cuda against triton, and tiles: launches queued ahead unless it says idle; medians with quartiles, and quartiles of
  the ratio of the two times of one round. The two backends had to agree with each other before. A tile is rows x width
  of its hidden rows. A direction's time holds the packing of weights and the final sums. A tile's results had to equal
  those of the planner's before it was timed; the fastest were timed once more, together.
* results.json holds every sample: `python -m benchmarks report DIR` draws it, `compare` sets two runs side by side.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write gpu.md into the folder named; exit code 2 where that cannot be done."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m benchmarks.gpu.report DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(given[0])))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
