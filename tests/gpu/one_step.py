"""Forward and backward on a GPU in a process of its own: `one_step.py BACKEND [--bad-label] [--small] [--no-trial]`."""

from __future__ import annotations

import sys

import torch
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy

from semeda_fast import SemedaLoss
from semeda_fast.backends import trial


def without_trial() -> None:
    """A backend's first use is no longer compared with the reference, whose cuDNN kernels are none of ours to watch."""

    def works(*arguments: object) -> None:
        return None

    trial.trial = works  # type: ignore[assignment]


def main(backend: str, bad_label: bool, small: bool) -> None:
    """Prints "one step done" at the end; a device-side assert ends the process before it."""
    sizes = [(1, 9, 11)] if small else [(1, 9, 11), (2, 33, 35)]
    for dtype in (torch.float32, torch.bfloat16):
        for n, h, w in sizes:
            criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=backend).cuda()
            logits, target = make_inputs(n=n, h=h, w=w)
            if bad_label:
                target[0, 1, 2] = NUM_CLASSES
            # Made on the CPU and copied: under a sanitizer only the loss's own kernels are on trial.
            leaf = logits.detach().to(dtype).cuda().requires_grad_()
            loss = criterion(leaf, target.cuda())
            loss.backward()
            torch.cuda.synchronize()
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad.cpu()).all()
            assert torch.isfinite(loss.detach().cpu())
    print("one step done", flush=True)


if __name__ == "__main__":
    if "--no-trial" in sys.argv:
        without_trial()
    main(sys.argv[1], "--bad-label" in sys.argv, "--small" in sys.argv)
