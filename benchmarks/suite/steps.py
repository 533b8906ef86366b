"""Whole training steps: network, loss, backward, optimizer. What the loss costs there, and the memory of a step.

All contenders of a case share one network and one optimizer, so that nothing but the loss differs between them. Its
weights change from step to step, which changes no time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import machine, memory
from ..contenders import Contender
from ..networks import Scaled, build, scaled_up
from ..plain import LossFunction
from ..timing import Step
from ..workloads import Inputs, Workload, make_inputs

LEARNING_RATE = 1e-4


@dataclass
class Training:
    """A network in training on one batch, always the same one.

    Attributes:
        inputs: of the loss; their logits are the network's first ones, scaled up.
        small: those as the network gives them [N,C,h,w], detached; what `inputs.logits` are made of.
        parts: seconds from the network's logits to their gradient, scaling included, one entry a step (empty on a GPU,
            which runs behind).
    """

    network: Scaled
    optimizer: torch.optim.Optimizer
    images: Tensor
    inputs: Inputs
    small: Tensor
    parts: list[float] = field(default_factory=list)

    @staticmethod
    def of(name: str, workload: Workload, device: str, *, tiny: bool = False) -> Training:
        """A network of NETWORKS on images of a workload's size, with its labels.

        The first logits of a network that knows nothing are nearly equal, so they are no test of a loss: labels
        leave their mark on them, as in `make_inputs`.

        Raises:
            ValueError, ImportError: the network cannot be built, or not for this size.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same network in every run
            network = build(name, workload.num_classes, (workload.height, workload.width), tiny=tiny).to(device)
        generator = torch.Generator().manual_seed(4)
        images = torch.randn((workload.batch, 3, workload.height, workload.width), generator=generator).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        inputs = make_inputs(workload, device)
        training = Training(network, optimizer, images, inputs, inputs.logits)
        with torch.no_grad():
            raw = training.forward(small=True)
            # In the network's memory order, so that every contender is checked and compiled for what it will get.
            marks = nn.functional.interpolate(inputs.logits, size=raw.shape[2:], mode="nearest")
            training.small = torch.empty_like(raw).copy_(raw + marks)
            logits = scaled_up(training.small, (workload.height, workload.width))
        if logits.shape != inputs.logits.shape or logits.dtype != inputs.logits.dtype:
            raise ValueError(
                f"{name} gives {logits.dtype} logits {tuple(logits.shape)}; expected {inputs.logits.dtype} "
                f"{tuple(inputs.logits.shape)}, one for each pixel"
            )
        training.inputs = replace(inputs, logits=logits)
        return training

    @property
    def gives_small_logits(self) -> bool:
        """Whether the network leaves the logits at a fraction of the labels' size."""
        return self.small.shape != self.inputs.logits.shape

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def forward(self, small: bool = False) -> Tensor:
        """The network's logits, under autocast where the workload asks for half precision; scaled up unless `small`."""
        dtype, device = self.inputs.workload.torch_dtype, self.images.device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits: Tensor = self.network.small(self.images) if small else self.network(self.images)
        return logits

    def leaf(self, small: bool = False) -> Tensor:
        """The logits as a leaf that wants a gradient, in the memory order of the network's."""
        return (self.small if small else self.inputs.logits).detach().clone().requires_grad_()

    def step_of(self, function: LossFunction, upsamples: bool = False) -> Step:
        """A step with this loss, as a training script takes it; on a CPU it notes the loss's own part in `parts`.

        Args:
            upsamples: whether the loss takes the logits as the network gives them.
        """
        timed = self.images.device.type == "cpu"
        size = (self.images.shape[-2], self.images.shape[-1])
        dtype, device = self.inputs.workload.torch_dtype, self.images.device.type

        def step() -> None:
            logits = self.forward(small=True)
            begin = time.perf_counter()
            if timed:
                logits.register_hook(lambda _: self.parts.append(time.perf_counter() - begin))
            if not upsamples:
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    logits = scaled_up(logits, size)
            function(logits, self.inputs.target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def parted(self, function: LossFunction, into: list[float], upsamples: bool = False) -> Step:
        """`step_of` that moves the loss's own part to a list of the contender's."""
        step = self.step_of(function, upsamples)

        def noting() -> None:
            step()
            into.extend(self.parts)
            self.parts.clear()

        return noting


def measure_peak(contender: Contender, name: str, workload: Workload, device: str, compiler: str) -> memory.Peak:
    """The peak of one step above weights, optimizer state and batch; call it in a fresh process.

    `gradient` of the result is the size of d_logits. Code, threads, libraries and the optimizer's state are there
    before: by a step with cross-entropy, and a call of the contender on a 32x32 map (of the full size where it is
    compiled for one size).
    """
    training = Training.of(name, workload, device)
    logits = training.inputs.logits
    gradient = logits.numel() * logits.element_size()
    reason = memory.why_no_peak() if device == "cpu" else ""
    if reason:
        return memory.Peak(None, gradient, None, reason)
    function = contender.make(training.inputs, compiler)
    training.step_of(lambda logits, target: nn.functional.cross_entropy(logits.float(), target, ignore_index=255))()
    if contender.compiled:
        training.step_of(function, contender.upsamples)()
    else:
        small = make_inputs(workload.replace(batch=1, height=32, width=32), device)
        contender.make(small, compiler)(small.leaf("nchw"), small.target).backward()
    training.inputs = replace(training.inputs, logits=logits[:, :, :1, :1])  # no step needs them
    training.small = training.small[:, :, :1, :1]
    del logits
    step = training.step_of(function, contender.upsamples)
    peak = memory.peak_of(step, device)
    return memory.Peak(peak, gradient, None)


def why_not_run(workload: Workload, device: str) -> str:
    """Why a case is left out; "" where it fits: eager networks want about 6 GiB for half a megapixel at the most."""
    total = machine.total_memory()
    need = 12_000 * workload.pixels
    if device == "cpu" and total is not None and need > 0.7 * total:
        return f"not run: too large (about {need / 2**30:.0f} GiB needed, {0.7 * total / 2**30:.0f} GiB allowed)"
    return ""
