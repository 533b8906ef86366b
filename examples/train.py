"""Train a semantic-segmentation network with cross-entropy, or with cross-entropy + SEMEDA.

    python examples/train.py --images train/images --masks train/masks \
        --val-images val/images --val-masks val/masks --num-classes 11 --ignore-index 11 \
        --loss ce+semeda --output runs/semeda

Everything here is an ordinary training script on PyTorch and Accelerate. What SEMEDA changes in it are two
lines, marked `SEMEDA: line 1 of 2` (build the criterion) and `SEMEDA: line 2 of 2` (call it).

Run the same command with `--resume` after an interruption. For several processes, start it with
`torchrun --nproc-per-node 2 examples/train.py ...` or `accelerate launch --multi_gpu --num_processes 2 ...`;
`--batch-size` stays the size of the whole batch, which the processes share.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
import traceback
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, gather_object, set_seed
from data import EpochBatches, InputError, Pairs, class_weights, make_datasets, make_loader
from options import parse_args, settings
from report import evaluate, write_report
from runfiles import RunFolder, StopSignal, rng_state, set_rng_state
from tqdm import tqdm
from unet import build_network

from semeda_fast import SemedaLoss
from semeda_fast.errors import BackendUnavailableError
from semeda_fast.schedule import ramp


def train(args: argparse.Namespace) -> int:
    """Train, validate, report; returns the exit code."""
    accelerator = make_accelerator(args)
    run = RunFolder(args.output, settings(args), resume=args.resume)

    train_set, val_set = make_datasets(args)
    batches = EpochBatches(len(train_set), args.batch_size, args.seed)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    loader = make_loader(train_set, batches, args.workers)

    set_seed(args.seed)  # the same initial weights in every process ...
    network = build_network(args.network, args.num_classes, width=args.width, depth=args.depth, norm=args.norm)
    if args.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_seed(args.seed, device_specific=True)  # ... but not the same dropout
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total_steps, power=0.9)

    criterion: Any
    weight = class_weights(train_set) if args.class_weights == "enet" else None
    if args.loss == "ce":
        criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=args.ignore_index).to(accelerator.device)
    else:
        options = {} if args.lambda_semeda is None else {"lambda_semeda": args.lambda_semeda}
        # --- SEMEDA: line 1 of 2: build the criterion ---
        criterion = SemedaLoss(
            args.proxy,
            num_classes=args.num_classes,
            ignore_index=args.ignore_index,
            weight=weight,
            backend=args.backend,
            layer_weights=args.layer_weights,
            distance=args.distance,
            **options,
        ).to(accelerator.device)
        # ------------------------------------------------
        full_lambda = float(criterion.lambda_semeda)

    network, optimizer, schedule, loader = accelerator.prepare(network, optimizer, schedule, loader)
    plain_network = accelerator.unwrap_model(network)

    checkpoint = run.load_checkpoint(args.branch)
    new = checkpoint is None and args.weights is not None
    trained = run.read_checkpoint(args.weights)["network"] if new else None
    first_epoch, first_step = 0, 0  # where to go on: an epoch, and steps done in it
    if checkpoint is not None:
        plain_network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["rng"]) == accelerator.num_processes:
            set_rng_state(checkpoint["rng"][accelerator.process_index])
        first_epoch, first_step = checkpoint["epoch"], checkpoint["step_in_epoch"]
    elif trained is not None:
        plain_network.load_state_dict(trained)
    step = first_epoch * steps_per_epoch + first_step

    def save(epoch: int, step_in_epoch: int, name: str = "checkpoint.pt") -> None:
        state = {
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "network": plain_network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            "rng": gather_object([rng_state()]),
        }
        if accelerator.is_main_process:
            run.save_checkpoint(state, name)

    accelerator.wait_for_everyone()  # no process may find what the first one writes now
    if accelerator.is_main_process:
        run.start(first_epoch, step)
    if checkpoint is not None:
        accelerator.print(f"Resuming {args.output} after step {step} of {total_steps}.")
    elif trained is not None:
        accelerator.print(f"The network of {args.weights} is trained further.")
    elif args.resume:
        accelerator.print(f"There is no checkpoint in {args.output} yet: starting from the beginning.")
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation images; {total_steps} steps in "
        f"{args.epochs} epochs; {accelerator.num_processes} process(es) on {accelerator.device.type}; "
        f"loss {args.loss}"
    )

    # Compiled objects share weights and settings with the plain ones, which checkpoints and the ramp use.
    forward = torch.compile(network) if args.compile else network
    compute_loss = torch.compile(criterion) if args.compile else criterion
    metrics: dict[str, Any] = {}
    timer = StepTimer(accelerator.device)
    stop = StopSignal()
    disable = None if accelerator.is_main_process else True  # None: only where somebody watches
    bar = tqdm(total=total_steps, initial=step, disable=disable, unit="step")
    with bar, stop.caught():
        for epoch in range(first_epoch, args.epochs):
            batches.start_at(epoch, first_step if epoch == first_epoch else 0)
            network.train()
            for images, target in loader:
                step += 1
                logged = step % args.log_every == 0 or step == 1
                timer.start(logged)
                if args.loss != "ce" and (args.semeda_start or args.semeda_ramp):
                    factor = ramp(step / steps_per_epoch, args.semeda_start, args.semeda_ramp, args.semeda_power)
                    # A tensor, so that a compiled criterion is not compiled again for each value.
                    criterion.lambda_semeda = torch.tensor(full_lambda * factor, device=accelerator.device)

                # The loss is a mean over the valid pixels of this process, and DDP averages over processes.
                # If void is unevenly spread that is not the mean over all valid pixels of the batch; it
                # becomes that mean if each process counts by its part of them.
                valid = (target != args.ignore_index).sum().float()
                share = valid / accelerator.reduce(valid, "mean").clamp(min=1)

                if args.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                logits = forward(images)
                if args.loss == "ce":
                    loss = ce = compute_loss(logits, target)
                    semeda = torch.zeros_like(loss)
                else:
                    # --- SEMEDA: line 2 of 2: call it (or just `loss = criterion(logits, target)`) ---
                    loss, ce, semeda, *_ = compute_loss(logits, target, return_components=True)
                    # ---------------------------------------------------------------------------------
                accelerator.backward(loss * share)
                optimizer.step()
                rate = optimizer.param_groups[0]["lr"]
                schedule.step()
                optimizer.zero_grad()

                seconds = timer.stop(logged)
                bar.update()
                if logged:
                    # torch's cross-entropy is NaN if all is void, though its gradient is 0, as is our share.
                    terms = (torch.stack([loss, ce, semeda]).detach().float() * share).nan_to_num()
                    loss_mean, ce_mean, semeda_mean = accelerator.reduce(terms, "mean").tolist()
                    bar.set_postfix(loss=f"{loss_mean:.4f}", refresh=False)
                    if accelerator.is_main_process:
                        run.log(
                            "train",
                            epoch,
                            step,
                            lr=rate,
                            loss=loss_mean,
                            ce=ce_mean,
                            semeda=semeda_mean,
                            lambda_semeda=float(criterion.lambda_semeda) if args.loss != "ce" else 0.0,
                            step_time_s=seconds,
                        )

                step_in_epoch = step - epoch * steps_per_epoch
                if (logged or accelerator.num_processes == 1) and told_to_stop(stop, accelerator):
                    save(epoch, step_in_epoch)
                    run.close()
                    accelerator.print(
                        f"\nStopped by signal {stop.number} after step {step} of {total_steps}, which is "
                        f"saved in {args.output}. Run the same command with --resume to go on."
                    )
                    return 128 + stop.number
                if step % args.checkpoint_every == 0 and step_in_epoch < steps_per_epoch:
                    save(epoch, step_in_epoch)

            if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
                metrics = validate(args, accelerator, network, val_set)
                scores = {name: metrics[name] for name in ("miou", "boundary_iou", "boundary_f")}
                if accelerator.is_main_process:
                    run.log("val", epoch, step, **scores)
                    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                    bar.write(f"epoch {epoch + 1} of {args.epochs}: {shown}", file=sys.stdout)
            save(epoch + 1, 0)
            if epoch + 1 == args.keep_epoch:
                save(epoch + 1, 0, f"checkpoint-{epoch + 1}.pt")

    if not metrics:  # resumed when all epochs were done
        metrics = validate(args, accelerator, network, val_set)
    if accelerator.is_main_process:
        table = write_report(run, plain_network.eval(), val_set, metrics, args)
        run.close()
        print(f"\n{table}\nWritten to {args.output}: report.md, report.json, log.csv, predictions.png")
    accelerator.end_training()
    return 0


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate for as many processes as were started, on GPUs if there are any."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Without a GPU, Accelerate joins several processes only if it is told that they run on CPUs.
        cpu=started > 1 and not (torch.cuda.is_available() or torch.xpu.is_available()),
        mixed_precision=args.mixed_precision,
        # Each process gets its slice of one global batch, and the schedule counts global steps.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        # Networks of transformers may have auxiliary heads that take no part in the loss.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.network != "unet")],
    )
    if started != accelerator.num_processes:
        raise InputError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true"
        )
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if launched_on_cpu and "WORLD_SIZE" not in os.environ:
        print(
            "note: this is one process. `accelerate launch --cpu --num_processes N` starts several only with "
            "MPI; use `torchrun --nproc-per-node N` or `accelerate launch --multi_gpu --num_processes N`.",
            file=sys.stderr,
        )
    if args.batch_size % accelerator.num_processes:
        raise InputError(
            f"--batch-size {args.batch_size} is the size of the whole batch and must be a multiple of the "
            f"{accelerator.num_processes} processes that share it"
        )
    return accelerator


def validate(
    args: argparse.Namespace, accelerator: Accelerator, network: torch.nn.Module, val_set: Pairs
) -> dict[str, Any]:
    """The metrics on the validation set, the same in every process."""
    return evaluate(
        network,
        val_set,
        accelerator,
        batch_size=args.batch_size,
        workers=args.workers,
        tolerance=args.boundary_tolerance,
    )


def told_to_stop(stop: StopSignal, accelerator: Accelerator) -> bool:
    """Whether any process got a signal; all processes get the same answer, so that they stop together."""
    if accelerator.num_processes > 1:
        number = torch.tensor(stop.number, device=accelerator.device)
        stop.number = int(accelerator.reduce(number, "max"))
    return stop.number != 0


class StepTimer:
    """Seconds from a batch's arrival to the end of its step; waits for the GPU only in logged steps."""

    def __init__(self, device: torch.device):
        self._device = device
        self._begin = 0.0

    def start(self, logged: bool) -> None:
        self._begin = self._now() if logged else 0.0

    def stop(self, logged: bool) -> float:
        return self._now() - self._begin if logged else 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, description=(__doc__ or "").split("\n\n")[0])
    try:
        return train(args)
    # What its user can put right; anything else is a fault of the code and keeps its traceback.
    except (ValueError, OSError, ImportError, BackendUnavailableError) as error:
        if args.traceback:
            raise
        # Frames keep the loader alive, whose workers no signal ends: the end of this process would wait for them.
        traceback.clear_frames(error.__traceback__)
        text = str(error).strip()
        if text.startswith("Caught "):  # from a loader's worker, which puts its traceback in front
            text = re.split(r"^[\w.]+Error: ", text, flags=re.MULTILINE)[-1]
        print(f"error: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, lines come when they are printed
    sys.exit(main())
