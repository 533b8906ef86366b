"""The processes and the device that train_proxy works with, found as Accelerate finds them.

Accelerate keeps one state for a whole Python process: devices, mixed precision, steps of accumulation, plugins. Only
the part that knows processes and devices is asked here, and nothing of it is left behind that was not there before.
So a script may train a proxy before it makes an Accelerator, after it, or in the middle of a job.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """Who shares a training.

    Attributes:
        device: of this process.
        number, count: which process this is, of how many.
    """

    def __init__(self, device: torch.device, number: int, count: int) -> None:
        self.device, self.number, self.count = device, number, count

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each process the mean of all processes' gradients."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean: Tensor = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def joined(accelerator: Accelerator | None) -> Iterator[Processes]:
    """The processes of `accelerator`, or those that a launcher started (whose process group stays), or this one."""
    if accelerator is not None:
        yield Processes(accelerator.device, accelerator.process_index, accelerator.num_processes)
        return
    from accelerate import PartialState

    known = bool(PartialState._shared_state)
    try:
        state = PartialState(cpu=on_cpu())
        yield Processes(state.device, state.process_index, state.num_processes)
    finally:
        if not known:  # it would decide for the caller's Accelerator(cpu=True), for instance
            PartialState._reset_state()


def on_cpu() -> bool:
    """Whether to say so to Accelerate: without a GPU it joins several processes only if told that they run on CPUs."""
    from accelerate.utils import parse_flag_from_env

    no_gpu = not (torch.cuda.is_available() or torch.xpu.is_available())
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or (several and no_gpu)


@contextmanager
def trained_in_fp32(device: torch.device) -> Iterator[None]:
    """Gradients in fp32 whatever the caller has switched on: autocast, no_grad, inference mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted({device.type, "cpu"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
