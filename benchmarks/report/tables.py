"""Tables of a run as rows of text; `report` puts them into Markdown, the pytest plugin onto the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..timing import Ratio, paired_ratio, quartiles

Record = dict[str, Any]
Rows = list[list[str]]
# What ratios are taken against: family, and how the column calls it.
BASELINE_FAMILIES = {
    "reference": "reference eager",
    "compiled": "torch.compile",
    "autocast": "eager, bf16 autocast",
    "compiled_autocast": "torch.compile, bf16 autocast",
    "ce": "cross-entropy alone",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plain(header: Sequence[str], rows: Rows) -> str:
    """The same for a terminal."""
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def milliseconds(record: Record) -> str:
    """'12.3 [12.1, 12.9]': median and quartiles, or what stands in their place."""
    if record["status"] != "ok":
        return verdict(record)
    q1, median, q3 = (1000 * value for value in quartiles(record["seconds"]))
    return f"{number(median)} [{number(q1)}, {number(q3)}]"


def verdict(record: Record) -> str:
    """What is shown in the place of a time."""
    if record["status"] == "wrong":
        return f"WRONG: {record['reason']}"
    return f"{'FAILED: ' if record['status'] == 'failed' else ''}{record['reason']}"


def number(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 to a million."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def ratio_text(ratio: Ratio) -> str:
    """'5.1x [4.9, 5.3]'."""
    return f"{number(ratio.value)}x [{number(ratio.low)}, {number(ratio.high)}]"


def groups(records: Iterable[Record], suite: str) -> dict[str, list[Record]]:
    """Timing records of a suite by the interleaved run they belong to."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] in ("time", "step") and (record["suite"] == suite or suite == ""):
            found.setdefault(record["group"], []).append(record)
    return found


def median(record: Record) -> float:
    """Median seconds of a record that has times."""
    return quartiles(record["seconds"])[1]


def fastest(records: Iterable[Record], family: str) -> Record | None:
    """The member of a family with the smallest median, None where none has times."""
    able = [record for record in records if record["family"] == family and record["status"] == "ok"]
    return min(able, key=median) if able else None


def ratios_of(record: Record, group: Sequence[Record]) -> dict[str, Ratio]:
    """How many times the fastest of each baseline family takes the record's time, by family."""
    found: dict[str, Ratio] = {}
    if record["status"] != "ok":
        return found
    for family in BASELINE_FAMILIES:
        baseline = fastest(group, family)
        if baseline is not None and baseline["family"] != record["family"]:
            found[family] = paired_ratio(baseline["seconds"], record["seconds"])
    return found


def time_table(by_allocator: dict[str, list[Record]]) -> tuple[list[str], Rows]:
    """Rows of contenders; of each allocator the median with quartiles, page faults, and saved bytes."""
    header = ["contender"]
    for allocator in by_allocator:
        header += [f"{allocator} malloc: ms [quartiles]", "page faults"]
    header.append("saved B/pixel")
    names = dict.fromkeys(record["contender"] for records in by_allocator.values() for record in records)
    rows = []
    for name in names:
        found = {a: next((r for r in records if r["contender"] == name), None) for a, records in by_allocator.items()}
        some = next(record for record in found.values() if record is not None)
        row = [f"{some['title']} (`{name}`)"]
        for record in found.values():
            row += ["", ""] if record is None else [milliseconds(record), _faults(record)]
        saved = some.get("saved_bytes_per_pixel")
        rows.append([*row, "" if saved is None else number(saved)])
    return header, rows


def _faults(record: Record) -> str:
    return f"{quartiles(record['faults'])[1]:.0f}" if record.get("faults") else ""


def ratio_table(by_allocator: dict[str, list[Record]]) -> tuple[list[str], Rows]:
    """Rows "baseline / contender", each by the fastest of its family; columns: the allocators.

    The library's backends are set against every baseline, plain PyTorch's other forms against the eager reference.
    """
    header = ["times of", *(f"{allocator} malloc" for allocator in by_allocator)]
    families: dict[str, bool] = {}
    for records in by_allocator.values():
        families.update({r["family"]: r["fused"] for r in records if r["status"] == "ok"})
    rows = []
    for family, fused in sorted(families.items(), key=lambda item: not item[1]):
        for baseline in BASELINE_FAMILIES if fused else ("reference",):
            if family == baseline or baseline not in families or family.startswith("ce"):
                continue
            cells = [_ratio_cell(records, baseline, family) for records in by_allocator.values()]
            title = BASELINE_FAMILIES.get(family, family)
            rows.append([f"{BASELINE_FAMILIES[baseline]} / {title}", *cells])
    return header, rows


def _ratio_cell(records: Sequence[Record], baseline: str, family: str) -> str:
    slow, fast = fastest(records, baseline), fastest(records, family)
    if slow is None or fast is None:
        return ""
    text = ratio_text(paired_ratio(slow["seconds"], fast["seconds"]))
    return f"{text} (`{slow['contender']}` / `{fast['contender']}`)"


def summary_table(grouped: Iterable[list[Record]]) -> tuple[list[str], Rows]:
    """One row a workload: the fastest of each family in ms, and what the library's backends gain."""
    listed = list(grouped)
    families: dict[str, bool] = {r["family"]: r["fused"] for group in listed for r in group}
    fused = [family for family, is_fused in families.items() if is_fused]
    header = ["workload", "edge pixels", *(f"{BASELINE_FAMILIES.get(f, f)}, ms [quartiles]" for f in families)]
    against = [b for b in ("reference", "compiled", "ce") if b in families]
    header += [f"{BASELINE_FAMILIES[b]} / {f}" for f in fused for b in against]
    rows = []
    for group in listed:
        row = [group[0]["workload_name"], f"{100 * group[0]['labels']['edge_share']:.1f} %"]
        for family in families:
            best = fastest(group, family)
            others = [record for record in group if record["family"] == family]
            row.append(milliseconds(best) if best else "; ".join(dict.fromkeys(verdict(r) for r in others)))
        for family in fused:
            winner = fastest(group, family)
            ratios = ratios_of(winner, group) if winner is not None else {}
            row += [ratio_text(ratios[b]) if b in ratios else "" for b in against]
        rows.append(row)
    return header, rows


def work_table(records: Sequence[Record], peaks: Record | None) -> tuple[list[str], Rows]:
    """GFLOP/s of the dense work, GB/s of the least traffic, and the shares of the machine's peaks."""
    header = ["contender", "malloc", "ms", "GFLOP/s", "share of FMA peak", "GB/s", "share of copy bandwidth"]
    rows = []
    for record in records:
        if record["status"] != "ok":
            continue
        pixels = record["workload"]["batch"] * record["workload"]["height"] * record["workload"]["width"]
        seconds, work = median(record), record["work"]
        flops = 0.0 if record["family"].startswith("ce") else work["flops"] * pixels / seconds
        traffic = work["bytes"] * pixels / seconds
        rows.append(
            [
                f"`{record['contender']}`",
                record["allocator"],
                number(1000 * seconds),
                number(flops / 1e9) if flops else "",
                f"{100 * flops / peaks['fma_flops']:.1f} %" if peaks and flops else "",
                number(traffic / 1e9),
                f"{100 * traffic / peaks['copy_bytes']:.1f} %" if peaks else "",
            ]
        )
    return header, rows


def memory_table(records: Sequence[Record]) -> tuple[list[str], Rows]:
    """Peak above inputs, the same without the gradient, what is held in between, and what autograd saves."""
    header = [
        "contender",
        "peak above inputs, MiB",
        "and above gradient, MiB",
        "held between, MiB",
        "saved B/pixel",
    ]
    rows = []
    for record in records:
        name = f"{record['title']} (`{record['contender']}`)"
        if record["status"] != "ok":
            rows.append([name, verdict(record), "", "", ""])
            continue
        saved = record["saved_bytes_per_pixel"]
        above = record["above_inputs"]
        rows.append(
            [
                name,
                mebibytes(above) if above is not None else f"not available: {record['reason']}",
                mebibytes(max(0, above - record["gradient"])) if above is not None else "",
                mebibytes(record["between"]) if record["between"] is not None else "",
                number(saved) if saved is not None else "not available",
            ]
        )
    return header, rows


def mebibytes(count: float) -> str:
    """Bytes as MiB with one digit after the point."""
    return f"{count / 2**20:.1f}"


def scaling_value(record: Record, axis: str) -> float:
    """Where a record stands on a scaling axis."""
    workload = record["workload"]
    if axis == "pixels":
        return float(workload["batch"] * workload["height"] * workload["width"])
    if axis == "classes":
        return 1.0 if workload["mode"] == "binary" else float(workload["num_classes"])
    return float(workload["batch"] if axis == "batch" else record["threads"])


def scaling_table(records: Sequence[Record], axis: str) -> tuple[list[str], Rows]:
    """Rows of points on the axis; of each contender the median time, and its time per pixel or its speedup."""
    names = list(dict.fromkeys(record["contender"] for record in records))
    unit = "speedup" if axis == "threads" else "ns/pixel"
    header = [axis, *(f"`{name}`: ms ({unit})" for name in names)]
    points: dict[float, dict[str, Record]] = {}
    for record in records:
        points.setdefault(scaling_value(record, axis), {})[record["contender"]] = record
    first = points[min(points)] if points else {}
    rows = []
    for point in sorted(points):
        row = [_point_text(point, points[point], axis)]
        for name in names:
            measured = points[point].get(name)
            row.append("not run: too large" if measured is None else _scaling_cell(measured, first.get(name), axis))
        rows.append(row)
    return header, rows


def _point_text(point: float, records: dict[str, Record], axis: str) -> str:
    if axis != "pixels":
        return f"{point:.0f}"
    workload = next(iter(records.values()))["workload"]
    return f"{workload['batch']}x{workload['height']}x{workload['width']}"


def _scaling_cell(record: Record, first: Record | None, axis: str) -> str:
    if record["status"] != "ok":
        return verdict(record)
    seconds = median(record)
    if axis == "threads":
        speedup = median(first) / seconds if first is not None and first["status"] == "ok" else float("nan")
        return f"{number(1000 * seconds)} ({speedup:.2f}x)"
    workload = record["workload"]
    pixels = workload["batch"] * workload["height"] * workload["width"]
    return f"{number(1000 * seconds)} ({number(1e9 * seconds / pixels)})"


def overhead(record: Record, group: Sequence[Record]) -> Ratio | None:
    """How much longer a training step takes than with cross-entropy alone, as a part of it (0.03: 3 %)."""
    plain = next((r for r in group if r["contender"] == "ce" and r["status"] == "ok"), None)
    if plain is None or record["status"] != "ok" or record is plain:
        return None
    ratio = paired_ratio(record["seconds"], plain["seconds"])
    return Ratio(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def loss_part(record: Record, group: Sequence[Record]) -> float | None:
    """The same from the loss's own time in the step, which other parts' noise does not reach; None on a GPU."""
    plain = next((r for r in group if r["contender"] == "ce" and r["status"] == "ok"), None)
    if plain is None or record["status"] != "ok" or not record.get("loss_seconds") or record is plain:
        return None
    return (quartiles(record["loss_seconds"])[1] - quartiles(plain["loss_seconds"])[1]) / median(plain)


def conditions(grouped: Iterable[list[Record]]) -> dict[tuple[str, str], list[list[Record]]]:
    """Groups of training steps by data set (and distance, where it is not L1), such as "voc-l2", and allocator."""
    found: dict[tuple[str, str], list[list[Record]]] = {}
    for group in grouped:
        workload = group[0]["workload"]
        distance = workload.get("distance", "l1")
        name = workload["dataset"] if distance == "l1" else f"{workload['dataset']}-{distance}"
        found.setdefault((name, group[0]["allocator"]), []).append(group)
    return found


def step_table(group: Sequence[Record], peaks: Iterable[Record] = ()) -> tuple[list[str], Rows]:
    """Rows of contenders: a whole training step, what it costs above cross-entropy alone, images a second, memory.

    Args:
        peaks: "step-memory" records; those of the group's network and workload are shown.
    """
    header = [
        "loss",
        "step, ms [quartiles]",
        "overhead [95 %]",
        "by the loss's own time",
        "images/s",
        "peak memory, MiB",
    ]
    memory = {(r["network"], r["workload_name"], r["contender"]): r for r in peaks}
    rows = []
    for record in group:
        name = f"{record['title']} (`{record['contender']}`)"
        if record["status"] != "ok":
            rows.append([name, verdict(record), *[""] * (len(header) - 2)])
            continue
        over, own = overhead(record, group), loss_part(record, group)
        peak = memory.get((record["network"], record["workload_name"], record["contender"]))
        known = peak is not None and peak["status"] == "ok" and peak["above_inputs"] is not None
        rows.append(
            [
                name,
                milliseconds(record),
                "" if over is None else f"{percent(over.value)} [{percent(over.low)}, {percent(over.high)}]",
                "" if own is None else percent(own),
                number(record["workload"]["batch"] / median(record)),
                mebibytes(peak["above_inputs"]) if known and peak is not None else "",
            ]
        )
    return header, rows


def percent(part: float) -> str:
    """'+3.1 %'."""
    return f"{100 * part:+.1f} %"
