"""Checkpoints: written whole or not at all, found again, thinned out."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shapwrap.errors import TrainingError
from shapwrap.training.random_stream import RandomStream

PREFIX = "step-"
PARTIAL = ".partial-"


class Position:
    """Where a run is, and the random state of what it does next; saved in every checkpoint."""

    def __init__(self, coalitions: torch.Generator, data: RandomStream):
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.records = 0
        self.coalitions = coalitions
        self.data = data
        self.data_at_epoch_start = data.state

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "records": self.records,
            "coalitions": self.coalitions.get_state(),
            "data_at_epoch_start": self.data_at_epoch_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there; the data stream is put to the start of the epoch, to be replayed."""
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.records = state["records"]
        self.coalitions.set_state(state["coalitions"])
        self.data_at_epoch_start = state["data_at_epoch_start"]
        self.data.state = self.data_at_epoch_start


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(directory.glob(f"{PREFIX}*"), key=lambda path: int(path.name[len(PREFIX) :]))


def save(accelerator: Accelerator, directory: Path, position: Position, keep: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove old ones.

    A run that is killed at any moment leaves the earlier checkpoints and at most a partial one,
    which is never read.
    """
    final = directory / f"{PREFIX}{position.step:08d}"
    partial = directory / f"{PARTIAL}{position.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    torch.save(position.state_dict(), partial / _position_file(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load(accelerator: Accelerator, directory: Path, position: Position) -> Path:
    """Read the newest complete checkpoint into everything that was prepared.

    Raises:
        TrainingError: There is none, or it was written by another number of processes.
    """
    found = checkpoints(directory)
    if not found:
        raise TrainingError(
            f"no checkpoint in {directory}; expected folders named {PREFIX}... from an earlier "
            "fit(). Call fit() without resume=True to start."
        )
    newest = found[-1]
    written = len(list(newest.glob("position-*.pt")))
    if written != accelerator.num_processes:
        raise TrainingError(
            f"{newest} was written by {written} processes, this run has "
            f"{accelerator.num_processes}; resume with as many."
        )
    accelerator.load_state(str(newest))
    # Our own file: generator states and counters, nothing from outside the run's directory.
    position.load_state_dict(torch.load(newest / _position_file(accelerator), weights_only=False))
    return newest


def _position_file(accelerator: Accelerator) -> str:
    return f"position-{accelerator.process_index}.pt"
