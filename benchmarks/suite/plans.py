"""What is measured: cases, the plans that group them by process, and the sets smoke, quick, steps and full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..contenders import NOT_INDUCTOR
from ..networks import CPU_NETWORKS, GPU_NETWORKS, NETWORKS
from ..timing import MODES, Budget
from ..workloads import DATASETS, DTYPES, HEADLINE, PROXIES, Workload, named, with_classes

ALLOCATORS = ("default", "tuned")
# "fused" stands for every backend of the registry but the reference, in both layouts; "upsampling" for those that take
# a network's logits before they are scaled up.
PLAIN = ("ce", "reference", "reference_cl")
BASELINES = ("ce", "ce_compiled", "reference", "reference_cl", "autocast", "compiled", "compiled_cl")
HALF = ("ce", "reference", "autocast", "autocast_cl", "compiled_autocast")
EVERYTHING = (
    *BASELINES,
    "autocast_cl",
    "compiled_max",
    "compiled_max_cl",
    "compiled_autocast",
    "compiled_autocast_cl",
    "fused",
)
STEPS = ("ce", "reference", "compiled")  # in training steps; the backends in one layout, that of the network's logits
SETS = ("smoke", "quick", "steps", "full")
WARMUP = {"default": 1, "tuned": 4}  # rounds; the tuned heap was seen to grow for up to six calls
QUICK_LIMIT = 285.0  # seconds; what has not begun by then is left out and named


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        kind: "time", "memory", "step" and "step-memory" (of a training step), or "peaks" (of the machine).
        suite: "headline", "workloads", "labels", "memory", "steps", "machine", or "scaling-" and an axis.
        threads: of this case.
        contenders: names from `contenders.contenders`, or "fused".
        mode: a name from `timing.MODES`.
        warmup: untimed rounds, after the call that checks each contender.
        network: of a training step, a name from `networks.NETWORKS`.
        tiny: the network in miniature.
    """

    kind: str
    suite: str
    threads: int
    workload: Workload | None = None
    contenders: tuple[str, ...] = ()
    mode: str = "fwdbwd"
    budget: Budget = field(default_factory=lambda: Budget(1.0))
    warmup: int = 2
    network: str = ""
    tiny: bool = False

    def group(self, plan: Plan) -> str:
        """Names the interleaved run: samples of one group belong together round by round."""
        assert self.workload is not None
        suite = f"{self.suite}/{self.network}" if self.network else self.suite
        return f"{suite}/{self.workload.name}/{self.mode}/{plan.allocator}/{self.threads} threads"


@dataclass(frozen=True)
class Plan:
    """The cases of one process.

    Attributes:
        name: unique in a run; `--only` matches it.
        allocator: "default" or "tuned".
        device: "cpu" or "cuda".
        compiler: torch.compile's backend; another than "inductor" gives no times worth reading.
        imports: modules that the worker imports first, for instance to register a backend.
        cache: folder for oracles, None keeps none.
    """

    name: str
    cases: tuple[Case, ...]
    allocator: str = "default"
    device: str = "cpu"
    compiler: str = "inductor"
    imports: tuple[str, ...] = ()
    cache: str | None = None

    @property
    def threads(self) -> int:
        """The most threads that a case wants."""
        return max((case.threads for case in self.cases), default=1)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal plan."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        cases = []
        for case in data["cases"]:
            workload = None if case["workload"] is None else Workload(**case["workload"])
            budget = Budget(**case["budget"])
            names = tuple(case["contenders"])
            cases.append(Case(**{**case, "workload": workload, "budget": budget, "contenders": names}))
        return Plan(**{**data, "cases": tuple(cases), "imports": tuple(data["imports"])})


def make_plans(which: str, *, device: str, threads: int, fused: Sequence[str], tuned: bool = True) -> list[Plan]:
    """The plans of a set, the most important first.

    Args:
        which: a name from SETS.
        threads: for all suites but the scaling with threads, which goes from 1 to this number.
        fused: names of the fused backends that can run here; each gets a process of its own for memory.
        tuned: whether the tuned allocator can be had on this machine (glibc, and the CPU).

    Raises:
        ValueError: an unknown set.
    """
    if which not in SETS:
        raise ValueError(f"the set must be one of {', '.join(SETS)}, got {which!r}")
    allocators = ALLOCATORS if tuned and device == "cpu" else ("default",)
    makers = {"smoke": _smoke, "quick": _quick, "steps": _steps, "full": _full}
    plans = makers[which](threads, allocators, fused)
    if which in ("steps", "full") and device == "cuda":
        plans = [plan for plan in plans if not plan.name.startswith("step")] + gpu_steps(threads, fused)
    if device == "cuda":
        plans = [plan for plan in map(_without_threads, plans) if plan.cases]
    return [replace(plan, device=device) for plan in plans]


def _without_threads(plan: Plan) -> Plan:
    """The plan without the scaling with threads of the processor, which says nothing of a GPU."""
    return replace(plan, cases=tuple(case for case in plan.cases if case.suite != "scaling-threads"))


def _smoke(threads: int, allocators: Sequence[str], fused: Sequence[str]) -> list[Plan]:
    """Everything in miniature, to try the suite out; the times mean nothing."""
    tiny = HEADLINE.replace(batch=1, height=64, width=64)
    budget = Budget(0.2, 3, 5)
    plans = [Plan("machine", (_peaks(threads, 0.1),))]
    for allocator in allocators:
        # Compiled contenders once: they take most of the time, and an allocator is not what they could fail of.
        contenders = EVERYTHING if allocator == allocators[0] else (*PLAIN, "fused")
        half = (*HALF, "fused") if allocator == allocators[0] else ("ce", "fused")
        cases = [
            Case("time", "headline", threads, tiny, contenders, "fwdbwd", budget),
            Case("time", "headline", threads, tiny.replace(dtype="bfloat16"), half, "fwdbwd", budget),
        ]
        plans.append(Plan(f"headline-{allocator}", tuple(cases), allocator))
    small = {"batch": 1, "height": 32, "width": 32}
    others = [
        *(named(name, **small) for name in DATASETS),
        *(named("voc", proxy=proxy, **small) for proxy in PROXIES if proxy != "default"),
        named("voc", dtype="float16", **small),
        *(named("voc", labels=labels, **small) for labels in ("scenes", "random")),
    ]
    cases = [Case("time", "workloads", threads, w, (*PLAIN, "fused"), "fwdbwd", budget) for w in others]
    cases += [Case("time", "workloads", threads, tiny, (*PLAIN, "fused"), mode, budget) for mode in MODES[:2]]
    plans.append(Plan("workloads", tuple(cases)))
    plans += _memory(threads, tiny, ("ce",), fused[:1])
    plans.append(Plan("step", (step_case("segformer_b0", tiny.replace(batch=2), threads, budget, tiny=True),)))
    plans.append(
        Plan(
            "scaling",
            (
                *_scaling("pixels", [tiny.replace(height=s, width=s) for s in (16, 32, 64)], threads, budget),
                *_scaling("classes", [with_classes(c, **small) for c in (1, 21, 256)], threads, budget),
                *_scaling("batch", [named("voc", **{**small, "batch": n}) for n in (1, 2)], threads, budget),
                *_threads_scaling(tiny, sorted({1, threads}), budget),
            ),
        )
    )
    return [replace(plan, compiler=NOT_INDUCTOR) for plan in plans]


def _quick(threads: int, allocators: Sequence[str], fused: Sequence[str]) -> list[Plan]:
    """The headline in fp32 under both allocators and in bf16 under one, memory, and a short scaling."""
    half = HEADLINE.replace(dtype="bfloat16")
    seconds = {"default": 12.0, "tuned": 8.0}
    plans = [Plan("machine", (_peaks(threads, 1.0),))]
    for allocator in allocators:
        budget = Budget(seconds[allocator], 5, 60)
        warmup = WARMUP[allocator]
        case = Case("time", "headline", threads, HEADLINE, (*BASELINES, "fused"), "fwdbwd", budget, warmup)
        plans.append(Plan(f"headline-float32-{allocator}", (case,), allocator))
    for allocator in allocators[-1:]:  # the other takes a minute, most of it compilation
        budget = Budget(seconds[allocator] / 2, 5, 60)
        case = Case("time", "headline", threads, half, (*HALF, "fused"), "fwdbwd", budget, WARMUP[allocator])
        plans.append(Plan(f"headline-bfloat16-{allocator}", (case,), allocator))
    plans += _memory(threads, HEADLINE, ("ce", "reference", "compiled"), fused)
    point = Budget(1.0, 5, 60)
    sides = [HEADLINE.replace(batch=1, height=s, width=s) for s in (64, 128, 256, 512, 1024)]
    classes = [with_classes(c, height=256, width=256) for c in (1, 21, 150)]
    cases = (
        *_scaling("pixels", sides, threads, point, most=2**18),
        *_threads_scaling(HEADLINE.replace(batch=1), sorted({1, threads}), point),
        *_scaling("classes", classes, threads, point),
    )
    plans += [Plan(f"scaling-{case.suite[8:]}-{number}", (case,)) for number, case in enumerate(cases)]
    return _merged_scaling(plans)


def _steps(threads: int, allocators: Sequence[str], fused: Sequence[str]) -> list[Plan]:
    """Whole training steps of every network: nearly an hour on two cores, the slowest and least telling last."""
    voc, cityscapes = named("voc"), named("cityscapes", batch=2)

    def plan(network: str, workload: Workload, allocator: str, name: str) -> Plan:
        case = step_case(network, workload, threads, Budget(90.0, 5, 30))
        return Plan(f"step-{network}-{name}-{allocator}", (case,), allocator)

    plans = [plan(network, voc, allocator, "voc") for network in CPU_NETWORKS for allocator in allocators]
    # What follows under one allocator, which the difference is not about.
    plans.append(plan(CPU_NETWORKS[0], voc.replace(distance="l2"), allocators[-1], "voc-l2"))
    plans += _step_memory(CPU_NETWORKS, voc, threads, fused)
    ordered = sorted(CPU_NETWORKS, key=lambda network: network == "upernet_resnet50")
    return plans + [plan(network, cityscapes, allocators[-1], "cityscapes") for network in ordered]


def gpu_steps(threads: int, fused: Sequence[str], kind: str = "camvid") -> list[Plan]:
    """The same on a GPU, in bf16 under autocast and at its size, the paper's network first."""
    plans = []
    sizes = {"deeplab_resnet101": {"batch": 8, "height": 513, "width": 513}}
    for network in GPU_NETWORKS:
        size = sizes.get(network, {"batch": 8})
        workload = named("voc", dtype="bfloat16", labels=kind, **size)
        plans.append(Plan(f"step-{network}-voc", (step_case(network, workload, threads, Budget(6.0, 7, 40)),)))
    deeplab = named("voc", dtype="bfloat16", labels=kind, **sizes["deeplab_resnet101"])
    return plans + _step_memory(GPU_NETWORKS[:1], deeplab, threads, fused)


def step_case(network: str, workload: Workload, threads: int, budget: Budget, tiny: bool = False) -> Case:
    """The training steps of one network."""
    contenders = (*STEPS, "fused", "upsampling")
    return Case("step", "steps", threads, workload, contenders, "step", budget, 1, network, tiny)


def _step_memory(networks: Sequence[str], workload: Workload, threads: int, fused: Sequence[str]) -> list[Plan]:
    """One plan, so one process, for each network and contender."""
    plans = []
    for network in networks:
        for name in (*STEPS, *(name for name in fused if not name.endswith("_cl"))):
            case = Case("step-memory", "steps", threads, workload, (name,), "step", network=network)
            plans.append(Plan(f"step-memory-{network}-{name}", (case,)))
        if not NETWORKS[network].full_size and "cpu" in fused:
            case = Case("step-memory", "steps", threads, workload, ("upsampling",), "step", network=network)
            plans.append(Plan(f"step-memory-{network}-upsampling", (case,)))
    return plans


def _merged_scaling(plans: list[Plan]) -> list[Plan]:
    """One process an axis instead of one a point: starting a process costs seconds."""
    merged: dict[str, Plan] = {}
    for plan in plans:
        axis = plan.cases[0].suite
        if not axis.startswith("scaling-"):
            merged[plan.name] = plan
        elif axis in merged:
            merged[axis] = replace(merged[axis], cases=(*merged[axis].cases, *plan.cases))
        else:
            merged[axis] = replace(plan, name=axis)
    return list(merged.values())


def _full(threads: int, allocators: Sequence[str], fused: Sequence[str]) -> list[Plan]:
    """Everything: hours on a few cores, most of them compilation of the baselines."""
    budget = Budget(60.0, 11, 100)
    plans = [Plan("machine", (_peaks(threads, 1.0),))]
    for dtype in ("float32", "bfloat16"):
        for allocator in allocators:
            for mode in MODES[::-1]:
                case = Case(
                    "time",
                    "headline",
                    threads,
                    HEADLINE.replace(dtype=dtype),
                    EVERYTHING,
                    mode,
                    budget,
                    WARMUP["tuned"],
                )
                plans.append(Plan(f"headline-{dtype}-{mode}-{allocator}", (case,), allocator))
    plans += _memory(threads, HEADLINE, ("ce", "reference", "reference_cl", "compiled", "autocast"), fused)
    point = Budget(20.0, 7, 60)
    for dataset in DATASETS:
        for proxy in PROXIES:
            for allocator in allocators:
                for dtype in DTYPES:
                    # The other modes are measured of the first workload alone.
                    for mode in MODES if (dataset, dtype) == ("voc", "float32") else MODES[2:]:
                        workload = named(dataset, proxy=proxy, dtype=dtype)
                        contenders = (*BASELINES, "compiled_autocast", "fused")
                        warmup = WARMUP[allocator]
                        case = Case("time", "workloads", threads, workload, contenders, mode, point, warmup)
                        plans.append(
                            Plan(f"workloads-{dataset}-{proxy}-{dtype}-{mode}-{allocator}", (case,), allocator)
                        )
    labels = [
        Case("time", "labels", threads, HEADLINE.replace(labels=kind, proxy=proxy), (*PLAIN, "fused"), budget=point)
        for kind in ("camvid", "scenes", "random")
        for proxy in PROXIES
    ]
    plans.append(Plan("labels", tuple(labels)))
    sides = [HEADLINE.replace(batch=1, height=s, width=s) for s in (64, 128, 256, 512, 1024, 2048)]
    counts = (1, 2, 4, 8, 11, 16, 19, 21, 32, 64, 128, 150, 256)
    for allocator in allocators:
        cases_of = {
            "pixels": _scaling("pixels", sides, threads, point, most=2**20),
            "classes": _scaling("classes", [with_classes(c) for c in counts], threads, point),
            "batch": _scaling("batch", [HEADLINE.replace(batch=n) for n in (1, 2, 4, 8, 16)], threads, point),
            "threads": _threads_scaling(HEADLINE, _thread_counts(threads), point),
        }
        plans += [Plan(f"scaling-{axis}-{allocator}", tuple(c), allocator) for axis, c in cases_of.items()]
    return plans + _steps(threads, allocators, fused)


def _thread_counts(threads: int) -> list[int]:
    """All counts up to 8, then doubling, and the last."""
    return sorted({*range(1, min(threads, 8) + 1), *(2**i for i in range(4, 10) if 2**i <= threads), threads})


def _peaks(threads: int, seconds: float) -> Case:
    return Case("peaks", "machine", threads, budget=Budget(seconds))


def _memory(threads: int, workload: Workload, baselines: Sequence[str], fused: Sequence[str]) -> list[Plan]:
    """One plan, so one process, for each contender."""
    names = (*baselines, *fused)
    return [Plan(f"memory-{name}", (Case("memory", "memory", threads, workload, (name,)),)) for name in names]


def _scaling(axis: str, workloads: Sequence[Workload], threads: int, budget: Budget, most: int = 2**40) -> list[Case]:
    """One case a point; the reference takes part up to `most` pixels, where it finishes in reasonable time."""
    cases = []
    for workload in workloads:
        reference = ("reference",) if workload.pixels <= most else ()
        cases.append(Case("time", f"scaling-{axis}", threads, workload, ("ce", *reference, "fused"), budget=budget))
    return cases


def _threads_scaling(workload: Workload, counts: Sequence[int], budget: Budget) -> list[Case]:
    return [Case("time", "scaling-threads", n, workload, ("ce", "reference", "fused"), budget=budget) for n in counts]
