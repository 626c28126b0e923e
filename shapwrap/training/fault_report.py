"""What a run says about faults: in its history, in warnings and in errors."""

import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from shapwrap.errors import CheckpointError, ShapwrapError
from shapwrap.training import checkpoint
from shapwrap.training.faults import CheckpointWarning
from shapwrap.training.history import History
from shapwrap.training.position import Position


class FaultReport:
    """Faults of one run.

    Args:
        history: Where they are recorded.
        accelerator: Its main process warns.
        directory: Of checkpoints; None if none are written.
    """

    def __init__(self, history: History, accelerator: Accelerator, directory: Path | None):
        self._history, self._accelerator, self._directory = history, accelerator, directory

    def not_saved(self, error: CheckpointError, position: Position, *, finished: bool) -> None:
        """A checkpoint could not be written.

        Raises:
            CheckpointError: It was the last one.
        """
        self._record("checkpoint_not_written", position, reason=str(error))
        if finished:
            raise CheckpointError(
                f"training has finished, but its last {error} The model is trained, in memory. "
                f"{self.what_is_saved()}"
            ) from error
        self._warn(f"{error} The run goes on.")

    def skipped(self, checkpoints: list[dict[str, Any]], position: Position) -> None:
        """Checkpoints that are newer than the one that the run goes on from, but not whole."""
        for skip in checkpoints:
            self._record("checkpoint_skipped", position, **skip)
            self._warn(
                f"{skip['checkpoint']} is not whole ({skip['reason']}); the run goes on from "
                f"step {position.step}, the newest whole checkpoint."
            )

    def stopped(self, error: ShapwrapError, position: Position) -> None:
        """The run ends with this error."""
        self._record("stopped", position, error=type(error).__name__, reason=str(error))

    def what_is_saved(self) -> str:
        """A sentence on what a new run can go on from."""
        found = [] if self._directory is None else checkpoint.checkpoints(self._directory)
        if not found:
            return "No checkpoint was written before."
        return f"{found[-1].name} is whole; fit(resume=True) in a new run goes on from there."

    def _record(self, kind: str, position: Position, **what: Any) -> None:
        self._history.add(kind=kind, step=position.step, epoch=position.epoch + 1, **what)

    def _warn(self, text: str) -> None:
        if self._accelerator.is_main_process:
            warnings.warn(text, CheckpointWarning, stacklevel=3)
