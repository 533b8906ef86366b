"""One process that measures one plan: `python -m benchmarks.suite.worker PLAN.json RESULT.json`.

The allocator, the number of threads and the memory of a process are settled before it starts, so each
condition gets its own. Results are written after every contender: what was measured survives an interruption.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semeda_fast.files import atomic_path

from .. import machine, memory, oracle, timing
from ..contenders import Contender, contenders, upsampling
from ..networks import NETWORKS
from ..plain import LossFunction
from ..work import activation_bytes, work_of
from ..workloads import Inputs, make_inputs
from . import limits, steps
from .limits import Step
from .plans import Case, Plan

Record = dict[str, Any]
ALONE = timing.Budget(0.0, 5, 5)
NETWORK_PIXELS = 4  # times the pixels of the loss


class Talk(NamedTuple):
    """What a case tells while it is measured."""

    keep: Callable[[list[Record]], None]  # its records so far
    say: limits.Say


def run_plan(plan: Plan, *, on_result: Any = None, say: limits.Say = limits.show) -> list[Record]:
    """Measure every case of a plan in this process.

    Args:
        on_result: called with all records so far after each contender and each case.
        say: called with each step before it begins.

    Returns:
        the records; a contender that is wrong, refuses or fails has a "status" that says so and no times.
    """
    for name in plan.imports:
        importlib.import_module(name)
    records: list[Record] = []
    for case in plan.cases:
        torch.set_num_threads(case.threads)
        if "torch._dynamo" in sys.modules:  # importing the compiler only to reset it takes a second
            torch.compiler.reset()
        done, about = list(records), _condition(plan, case)

        def keep(found: list[Record], done: list[Record] = done, about: Record = about) -> None:
            if on_result is not None:
                on_result([*done, *({**about, **record} for record in found)])

        found = MEASURES[case.kind](case, plan, Talk(keep, say))
        records += [{**about, **record} for record in found]
        if on_result is not None:
            on_result(records)
    return records


def _condition(plan: Plan, case: Case) -> Record:
    return {
        "kind": case.kind,
        "suite": case.suite,
        "plan": plan.name,
        "allocator": plan.allocator,
        "threads": case.threads,
        "device": plan.device,
        "compiler": plan.compiler,
    }


def _peaks_case(case: Case, plan: Plan, talk: Talk) -> list[Record]:
    talk.say(Step(f"{plan.name}: what the machine can do", limits.LEAST + limits.SLACK * case.budget.seconds))
    quick = case.budget.seconds < 1
    return [{"status": "ok", **machine.measure_peaks(plan.device, case.threads, quick=quick)}]


def _chosen(case: Case, plan: Plan) -> list[Contender]:
    """The case's contenders that exist here; "fused" and "upsampling" stand for some of the registry's backends."""
    full_size, small = contenders(plan.device), upsampling(plan.device)
    known = {**full_size, **small}
    names: dict[str, None] = {}
    for name in case.contenders:
        groups = {"fused": [n for n, c in full_size.items() if c.fused], "upsampling": list(small)}
        names.update(dict.fromkeys(groups.get(name, [name])))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"contenders must be from {', '.join(known)}; got {', '.join(missing)}")
    return [known[name] for name in names]


def _facts(case: Case, inputs: Inputs | None) -> Record:
    assert case.workload is not None
    facts = {"workload": vars(case.workload), "workload_name": case.workload.name, "mode": case.mode}
    if inputs is not None:
        facts["labels"] = vars(inputs.facts)
    return facts


def _time_case(case: Case, plan: Plan, talk: Talk) -> list[Record]:
    """Check every contender, then time those that are right in one interleaved run."""
    assert case.workload is not None
    label, pixels = f"{plan.name}: {case.workload.name} {case.mode}", case.workload.pixels
    talk.say(_inputs_step(label, pixels))
    inputs = make_inputs(case.workload, plan.device)
    torch.backends.cudnn.benchmark = False  # the oracle's strips have many shapes
    truth = oracle.cached_oracle(inputs, Path(plan.cache) if plan.cache else None)
    if plan.device == "cuda":
        _settle_cuda(case.workload.dtype)
    records: dict[str, Record] = {}
    steps: dict[str, timing.Step] = {}
    chosen = _chosen(case, plan)
    for number, contender in enumerate(chosen, start=1):
        record = {**_facts(case, inputs), **_about(contender), "group": case.group(plan)}
        records[contender.name] = record
        reason = why_not_run(contender, inputs)
        if reason:
            record.update(status="skipped", reason=reason)
            continue
        talk.say(_check_step(f"{label}: {number} of {len(chosen)}", contender, pixels))
        try:
            step = _checked_step(contender, case, plan, inputs, truth, record)
            if step is not None:
                record.update(stopped(step, plan.device))
        except Exception as error:  # one contender's failure must not take the others' results with it
            record.update(**_failure(contender, error))
            continue
        if step is not None:
            steps[contender.name] = step
        talk.keep(list(records.values()))
    watch = limits.Watch(label, limits.first_calls(chosen, pixels), case.budget, talk.say)
    run = timing.interleaved(steps, case.budget, device=plan.device, warmup=case.warmup, watch=watch)
    for name, samples in run.items():
        records[name].update(status="ok", seconds=samples.seconds, faults=samples.faults)
        records[name].pop("reason", None)
    talk.keep(list(records.values()))
    if plan.device == "cuda":
        run = timing.interleaved(steps, case.budget, device="cuda", warmup=1, queued=True, watch=watch)
        for name, samples in run.items():
            records[name]["queued_seconds"] = samples.seconds
    return list(records.values())


def stopped(step: timing.Step, device: str) -> Record:
    """What stays of a contender that is right where the run is stopped before all are timed side by side.

    Its time alone, on a GPU, is no part of a ratio: the others' come from other minutes.
    """
    found: Record = {"status": "skipped", "reason": "stopped before the contenders were timed side by side"}
    if device == "cuda":
        seconds = timing.interleaved({"": step}, ALONE, device=device, warmup=1)[""].seconds
        q1, median, q3 = (1000 * value for value in timing.quartiles(seconds))
        found.update(alone_seconds=seconds, reason=f"{found['reason']}; alone {median:.3g} ms [{q1:.3g}, {q3:.3g}]")
    return found


def _settle_cuda(dtype: str) -> None:
    """How cuDNN computes for all contenders of a case: its fastest algorithm, and no TF32 where logits are fp32.

    TF32, torch's default for convolutions, keeps 10 bits of a feature: fp32 results would fail the check.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype != "float32"


def judged_as(contender: Contender, device: str, dtype: str) -> str:
    """By which tolerance: where cuDNN convolves in TF32, whoever leaves it to cuDNN rounds operands as autocast does.

    TF32 keeps 10 bits of a feature where fp32 has 23: simulated, the loss is off by 1.8e-3, the gradient by 2.3e-2.
    """
    in_tf32 = device == "cuda" and dtype != "float32" and contender.checked_as == "loss" and not contender.fused
    return "autocast" if in_tf32 else contender.checked_as


def _about(contender: Contender) -> Record:
    return {
        "contender": contender.name,
        "title": contender.title,
        "family": contender.family,
        "layout": contender.layout,
        "fused": contender.fused,
    }


def _checked_step(
    contender: Contender, case: Case, plan: Plan, inputs: Inputs, truth: oracle.Oracle, record: Record
) -> timing.Step | None:
    """The step to time, or None for a contender that is wrong; fills in what the check found."""
    leaf = inputs.leaf(contender.layout)
    function = contender.make(inputs, plan.compiler)
    start = time.perf_counter()
    result = oracle.check(function, leaf, inputs, truth, judged_as(contender, plan.device, inputs.workload.dtype))
    record["first_call_seconds"] = time.perf_counter() - start  # for compiled contenders: the compilation
    record["check"] = oracle.as_json(result)
    if not result.ok:
        record.update(status="wrong", reason=result.describe())
        return None
    if case.mode == "fwdbwd":
        record["saved_bytes_per_pixel"] = _saved_per_pixel(function, leaf, inputs)
    record["work"] = vars(work_of(inputs.workload, case.mode))
    return timing.make_step(function, leaf, inputs.target, case.mode, inputs.workload.grad_scale)


def _saved_per_pixel(function: LossFunction, leaf: Tensor, inputs: Inputs) -> float | None:
    try:
        return memory.saved_bytes(function, leaf, inputs) / inputs.workload.pixels
    except RuntimeError:  # a compiler that cannot run under hooks
        return None


def _step_case(case: Case, plan: Plan, talk: Talk) -> list[Record]:
    """Check every contender on a network's logits, then time whole training steps in one interleaved run."""
    assert case.workload is not None
    about = {**_facts(case, None), "network": case.network, "title_network": NETWORKS[case.network].title}
    chosen = [c for c in _chosen(case, plan) if not (c.fused and c.layout != "nchw")]
    chosen = [c for c in chosen if not (c.upsamples and NETWORKS[case.network].full_size)]
    reason = NETWORKS[case.network].why_not() or steps.why_not_run(case.workload, plan.device)
    if reason:
        group = case.group(plan)
        return [{**about, **_about(c), "group": group, "status": "skipped", "reason": reason} for c in chosen]
    # Networks take more than the loss does: a pixel of theirs counts as many.
    label, pixels = f"{plan.name}: {case.network} {case.workload.name}", NETWORK_PIXELS * case.workload.pixels
    talk.say(_inputs_step(label, pixels))
    training = steps.Training.of(case.network, case.workload, plan.device, tiny=case.tiny)
    about.update(labels=vars(training.inputs.facts), parameters=training.parameters)
    truth = oracle.compute_oracle(training.inputs)
    size = (training.small.shape[2], training.small.shape[3])
    small_truth = oracle.of_small_logits(truth, size) if training.gives_small_logits else truth
    if plan.device == "cuda":
        _settle_cuda(case.workload.dtype)
    records: dict[str, Record] = {}
    todo: dict[str, timing.Step] = {}
    parts: dict[str, list[float]] = {}
    for number, contender in enumerate(chosen, start=1):
        records[contender.name] = record = {**about, **_about(contender), "group": case.group(plan)}
        talk.say(_check_step(f"{label}: {number} of {len(chosen)}", contender, pixels))
        try:
            function = contender.make(training.inputs, plan.compiler)
            leaf, right = training.leaf(contender.upsamples), small_truth if contender.upsamples else truth
            judged = judged_as(contender, plan.device, case.workload.dtype)
            result = oracle.check(function, leaf, training.inputs, right, judged)
            record["check"] = oracle.as_json(result)
        except Exception as error:
            record.update(**_failure(contender, error))
            continue
        if not result.ok:
            record.update(status="wrong", reason=result.describe())
            continue
        into = parts.setdefault(contender.name, [])
        todo[contender.name] = training.parted(function, into, contender.upsamples)
        record.update(stopped(todo[contender.name], "cpu"))  # without a time: a step trains the network
        talk.keep(list(records.values()))
    watch = limits.Watch(label, limits.first_calls(chosen, pixels), case.budget, talk.say)
    run = timing.interleaved(todo, case.budget, device=plan.device, warmup=case.warmup, watch=watch)
    for name, samples in run.items():
        rounds = len(samples.seconds)
        records[name].update(status="ok", seconds=samples.seconds, faults=samples.faults)
        records[name].pop("reason", None)
        records[name]["loss_seconds"] = parts[name][-rounds:] or None
    return list(records.values())


def _step_memory_case(case: Case, plan: Plan, talk: Talk) -> list[Record]:
    assert case.workload is not None
    pixels = NETWORK_PIXELS * case.workload.pixels
    records = []
    for contender in _chosen(case, plan):
        about = {**_facts(case, None), "network": case.network, "title_network": NETWORKS[case.network].title}
        record = {**about, **_about(contender)}
        records.append(record)
        label = f"{plan.name}: memory of a step of {case.network}"
        talk.say(Step(f"{label} with {contender.name}", limits.preparing(contender, pixels), contender.name))
        reason = NETWORKS[case.network].why_not() or steps.why_not_run(case.workload, plan.device)
        if reason:
            record.update(status="skipped", reason=reason)
            continue
        try:
            peak = steps.measure_peak(contender, case.network, case.workload, plan.device, plan.compiler)
            record.update(status="ok", **vars(peak))
        except Exception as error:
            record.update(**_failure(contender, error))
        talk.keep(records)
    return records


def _inputs_step(label: str, pixels: int) -> Step:
    return Step(
        f"{label}: inputs, and the reference in float64", limits.LEAST + limits.SLACK * limits.PER_PIXEL * pixels
    )


def _check_step(label: str, contender: Contender, pixels: int) -> Step:
    what = "compiled and checked" if contender.compiled else "checked"
    return Step(f"{label}, {contender.name}, is {what}", limits.preparing(contender, pixels), contender.name)


def why_not_run(contender: Contender, inputs: Inputs) -> str:
    """Why a plain-PyTorch contender is left out: too large an estimate for this machine's memory."""
    if contender.fused or contender.checked_as == "ce":
        return ""
    if inputs.logits.device.type == "cuda":
        limit: float | None = 0.5 * torch.cuda.get_device_properties(0).total_memory
    else:
        total = machine.total_memory()
        limit = None if total is None else 0.5 * total
    need = activation_bytes(inputs.workload)
    if limit is not None and need > limit:
        return f"not run: too large (about {need / 2**30:.0f} GiB needed, {limit / 2**30:.0f} GiB allowed)"
    return ""


def _memory_case(case: Case, plan: Plan, talk: Talk) -> list[Record]:
    assert case.workload is not None
    talk.say(_inputs_step(plan.name, case.workload.pixels))
    inputs = make_inputs(case.workload, plan.device)
    records = []
    for contender in _chosen(case, plan):
        record = {**_facts(case, inputs), **_about(contender)}
        records.append(record)
        seconds = limits.preparing(contender, case.workload.pixels)
        talk.say(Step(f"{plan.name}: memory of {contender.name}", seconds, contender.name))
        reason = why_not_run(contender, inputs)
        if reason:
            record.update(status="skipped", reason=reason)
            continue
        try:
            peak = memory.measure_peak(contender, inputs, plan.compiler)
            function = contender.make(inputs, plan.compiler)
            leaf = inputs.leaf(contender.layout)
            record.update(status="ok", **vars(peak), saved_bytes_per_pixel=_saved_per_pixel(function, leaf, inputs))
        except Exception as error:
            record.update(**_failure(contender, error))
        talk.keep(records)
    return records


def _failure(contender: Contender, error: Exception) -> Record:
    """How a contender ended; a fused backend may leave a proxy or a dtype to others, which is no failure."""
    if contender.fused and isinstance(error, ValueError) and "cannot do this" in str(error):  # of backends.choose
        return {"status": "skipped", "reason": f"not run: {error}"}
    return {"status": "failed", "reason": first_line(error), "traceback": traceback.format_exc()}


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


MEASURES = {
    "time": _time_case,
    "memory": _memory_case,
    "step": _step_case,
    "step-memory": _step_memory_case,
    "peaks": _peaks_case,
}


def write_records(path: Path, records: list[Record]) -> None:
    """Replace the result file in one step."""
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(records), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 also where a contender was wrong, which its record says."""
    plan_path, result_path = (sys.argv[1:] if arguments is None else arguments)[:2]
    plan = Plan.from_json(json.loads(Path(plan_path).read_text(encoding="utf-8")))
    run_plan(plan, on_result=lambda records: write_records(Path(result_path), records), say=limits.send)
    return 0


if __name__ == "__main__":
    sys.exit(main())
