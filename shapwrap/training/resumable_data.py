"""Data that splits itself among processes and can go on in the middle of an epoch."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class ResumableData(Protocol):
    """Batches, one epoch an iteration; what is streamed need not be streamed again to resume.

    The loop replays other data from the start of the epoch instead.
    """

    def split(self, process_index: int, num_processes: int) -> Self:
        """A copy with the share of one process; all shares have as many batches."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its start."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: after the last batch that it gave."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on there."""
        ...

    def take_over(self, states: Sequence[dict[str, Any]]) -> None:
        """Take from the states of another number of processes what outlasts an epoch.

        Raises:
            TrainingError: Other data.
        """
        ...

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, or those that are left of it."""
        ...

    def __len__(self) -> int:
        """Batches of one process in a whole epoch."""
        ...
