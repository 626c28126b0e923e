"""Checkpoints: written whole or not at all, found again, thinned out."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from shapwrap.errors import TrainingError
from shapwrap.training.position import Position

PREFIX = "step-"
PARTIAL = ".partial-"


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(directory.glob(f"{PREFIX}*"), key=lambda path: int(path.name[len(PREFIX) :]))


def check_unused(directory: Path) -> None:
    """Raise if another run has left checkpoints, which a new one would mix with its own.

    Raises:
        TrainingError: There are some.
    """
    if found := checkpoints(directory):
        raise TrainingError(
            f"{directory} holds checkpoints of an earlier run, the newest {found[-1].name}; go on "
            "with fit(resume=True) (--resume), choose another output_dir (--out), or delete them."
        )


def save(accelerator: Accelerator, directory: Path, position: Position, keep: int) -> None:
    """Write a checkpoint under a temporary name, rename it, and remove old ones.

    A run that is killed at any moment leaves the earlier checkpoints and at most a partial one,
    which is never read.
    """
    final = directory / f"{PREFIX}{position.step:08d}"
    partial = directory / f"{PARTIAL}{position.step:08d}"
    if final.exists():
        return
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    torch.save(position.state_dict(), partial / _position_file(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.replace(final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, directory: Path, position: Position) -> None:
    """Read the newest complete checkpoint into everything that was prepared.

    Raises:
        TrainingError: There is none, or it is of another number of processes or another run.
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
    # Our own file: generator states and counters, nothing from outside the run's directory.
    state = torch.load(newest / _position_file(accelerator), weights_only=False)
    position.load_state_dict(state)
    accelerator.load_state(str(newest))


def _position_file(accelerator: Accelerator) -> str:
    return f"position-{accelerator.process_index}.pt"
