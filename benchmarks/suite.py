"""The groups that `pytest benchmarks/` measures, about five minutes in all on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import runner
from .contenders import contenders
from .plans import BASELINES
from .timing import Budget
from .workloads import HEADLINE, Workload, named


@dataclass(frozen=True)
class Group:
    """One table of pytest-benchmark: a workload, a mode and an allocator, and who takes part.

    Attributes:
        contenders: names; "fused" stands for every backend of the registry but the reference.
        budget: of the interleaved run of all contenders.
    """

    label: str
    workload: Workload
    allocator: str
    baselines: tuple[str, ...]
    mode: str = "fwdbwd"
    budget: Budget = field(default_factory=lambda: Budget(4.0, 5, 60))

    @property
    def name(self) -> str:
        """Such as "headline default malloc"."""
        return f"{self.label}, {self.mode}, {self.allocator} malloc"

    @property
    def contenders(self) -> tuple[str, ...]:
        """The baselines, and every fused backend that can run here."""
        return (*self.baselines, *(name for name, contender in contenders().items() if contender.fused))


def groups() -> list[Group]:
    """All groups; without glibc those of the tuned allocator are left out."""
    half = ("ce", "reference", "autocast", "compiled_autocast")
    few = ("ce", "reference", "reference_cl")
    wide = HEADLINE.replace(proxy="wide")
    found = [
        Group("headline", HEADLINE, "default", BASELINES, budget=Budget(20.0, 5, 60)),
        Group("headline", HEADLINE, "tuned", BASELINES, budget=Budget(12.0, 5, 60)),
        Group("headline bf16", HEADLINE.replace(dtype="bfloat16"), "tuned", half, budget=Budget(8.0, 5, 60)),
        Group("headline", HEADLINE, "tuned", ("ce", "reference"), "nograd"),
        Group("headline", HEADLINE, "tuned", ("ce", "reference"), "forward"),
        Group("wide", wide, "tuned", few, budget=Budget(8.0, 5, 60)),
    ]
    for dataset in ("cityscapes", "camvid", "ade20k", "binary"):
        found.append(Group(dataset, named(dataset, height=256, width=256), "tuned", few))
    return [group for group in found if group.allocator == "default" or not runner.tuned_reason()]
