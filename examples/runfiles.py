"""What a training run keeps on disk, so that it survives `kill -9`: settings, checkpoint and logs.

settings.json     what was asked for; marks the folder as ours
checkpoint.pt     all that is needed to go on, replaced in one step
log.csv           one row each --log-every steps, and one per validation
tensorboard/      the same for TensorBoard, where it is installed
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from data import InputError

from semeda_fast.files import atomic_path

COLUMNS = (
    *("kind", "epoch", "step", "lr", "loss", "ce", "semeda", "lambda_semeda", "step_time_s"),
    *("miou", "boundary_iou", "boundary_f"),
)
FORMAT = "semeda-fast-example-1"


class RunFolder:
    """The output folder of one run. Making the object only reads; `start` writes.

    Args:
        folder: where to write; made if missing.
        settings: whatever decides the result; a run is only resumed with the settings it was started with.
        resume: whether to go on with what lies there. Without it, a folder that is not empty is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self.folder = folder
        self._settings = json.loads(json.dumps(settings, default=str))
        self._file: Any = None
        self._board: Any = None
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {folder} is a file; give a folder")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not resume:
            raise InputError(
                f"--output {folder} is not empty; add --resume to go on with the run in it, or choose another folder"
            )
        if not (folder / "settings.json").is_file():
            raise InputError(f"--output {folder} holds files but no run to resume (no settings.json); choose another")
        before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)!r} and is {self._settings.get(name)!r}"
            for name in sorted({*before, *self._settings})
            if before.get(name) != self._settings.get(name)
        ]
        if changed:
            raise InputError(
                f"cannot resume {folder} with other settings: {'; '.join(changed)}; "
                "give the settings of the first start, or start anew in another --output"
            )

    def load_checkpoint(self, branch: Path | None = None) -> dict[str, Any] | None:
        """The last checkpoint, else that of another run, `branch`, or None."""
        own = self.folder / "checkpoint.pt"
        if own.is_file():
            return self.read_checkpoint(own, "remove that file to start from the beginning")
        return None if branch is None else self.read_checkpoint(branch)

    @staticmethod
    def read_checkpoint(path: Path, remedy: str = "give a checkpoint.pt that it has written") -> dict[str, Any]:
        """Tensors and plain values of a checkpoint, no code.

        Raises:
            InputError: it is not there, or no checkpoint of this script.
        """
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']!r}")
        except Exception as error:  # torch.load raises many kinds
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{path} is not a readable checkpoint of this script ({reason}); {remedy}") from error
        return state

    def start(self, epoch: int, step: int) -> None:
        """Open the logs (main process only); drop what was logged after the position that we go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write("settings.json", json.dumps(self._settings, indent=2) + "\n")
        rows = [row for row in self.rows() if _is_before(row, epoch, step)]
        with (
            atomic_path(self.folder / "log.csv", overwrite=True) as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._file = (self.folder / "log.csv").open("a", newline="", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            purge = step + 1 if step else None  # TensorBoard then hides what came after
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def log(self, kind: str, epoch: int, step: int, **values: float) -> None:
        """Add a row; `kind` is "train" or "val". `repr` keeps every digit of a float."""
        texts = {name: repr(value) for name, value in values.items()}
        csv.DictWriter(self._file, COLUMNS).writerow({"kind": kind, "epoch": epoch, "step": step, **texts})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def rows(self) -> list[dict[str, str]]:
        """The complete rows of log.csv."""
        path = self.folder / "log.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]

    def save_checkpoint(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        """Replace the checkpoint; at any moment the file on disk is the old one or the new one."""
        os.fsync(self._file.fileno())  # the logs are never behind the checkpoint
        if self._board is not None:
            self._board.flush()
        with atomic_path(self.folder / name, overwrite=True) as path:
            torch.save({"format": FORMAT, **state}, path)

    def write(self, name: str, text: str) -> None:
        """Write a small text file."""
        with atomic_path(self.folder / name, overwrite=True) as path:
            path.write_text(text, encoding="utf-8")

    def close(self) -> None:
        for log in (self._file, self._board):
            if log is not None:
                log.close()


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the loop can save before it ends; the second one kills."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        old = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def rng_state() -> dict[str, Any]:
    """The generators that networks draw from (dropout and the like); those of the data need no saving."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_before(row: dict[str, str], epoch: int, step: int) -> bool:
    try:
        # An epoch's validation belongs to the past once the next epoch has begun.
        return int(row["step"]) <= step if row["kind"] == "train" else int(row["epoch"]) < epoch
    except ValueError:  # a row that was being written when the process died
        return False
