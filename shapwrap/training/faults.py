"""What goes wrong during a run without being a mistake of the program."""

import re

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


class TrainingWarning(UserWarning):
    """The run goes on, but something was lost or left out."""


class CheckpointWarning(TrainingWarning):
    """A checkpoint could not be written, or could not be used and an older one was."""


def died(error: BaseException) -> bool:
    """Whether torch says that a worker process of a DataLoader has died."""
    return isinstance(error, RuntimeError) and _DEAD_WORKER.search(str(error)) is not None
