"""The groups that `pytest benchmarks/` measures, about six minutes in all on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..contenders import contenders, upsampling
from ..networks import NETWORKS
from ..timing import Budget
from ..workloads import HEADLINE, Workload, named
from . import runner
from .plans import BASELINES, STEPS


@dataclass(frozen=True)
class Group:
    """One table of pytest-benchmark: a workload, a mode and an allocator, and who takes part.

    Attributes:
        contenders: names; "fused" stands for every backend of the registry but the reference.
        budget: of the interleaved run of all contenders.
        network: of a group of whole training steps, a name from `networks.NETWORKS`.
    """

    label: str
    workload: Workload
    allocator: str
    baselines: tuple[str, ...]
    mode: str = "fwdbwd"
    budget: Budget = field(default_factory=lambda: Budget(4.0, 5, 60))
    network: str = ""

    @property
    def name(self) -> str:
        """Such as "headline default malloc"."""
        return f"{self.label}, {self.mode}, {self.allocator} malloc"

    @property
    def kind(self) -> str:
        """Of the case that measures it."""
        return "step" if self.network else "time"

    @property
    def contenders(self) -> tuple[str, ...]:
        """The baselines, and every fused backend that can run here."""
        layouts = ("nchw",) if self.network else ("nchw", "channels_last")
        fused = (name for name, contender in contenders().items() if contender.fused and contender.layout in layouts)
        small = upsampling() if self.network and not NETWORKS[self.network].full_size else ()
        return (*self.baselines, *fused, *small)


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
    for network in ("segformer_b0", "mobilenet_v2"):  # the others take minutes
        budget = Budget(10.0, 4, 20)
        found.append(Group(network, HEADLINE, "tuned", STEPS, "step", budget, network))
    return [group for group in found if group.allocator == "default" or not runner.tuned_reason()]
