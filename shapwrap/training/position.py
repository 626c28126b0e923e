"""Where a run is, and the random state of what it does next."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from shapwrap.errors import TrainingError
from shapwrap.training.random_stream import RandomStream
from shapwrap.training.resumable_data import ResumableData


class Position:
    """Step, epoch and batch of a run with its random states; saved in every checkpoint.

    Args:
        coalitions: The generator of coalitions.
        data: The stream that shuffling and augmentation draw from.
        loader: The training data; a loader may have generators of its own, resumable data a state.
        plan: What training depends on; a run can only be resumed with the same.
    """

    def __init__(
        self, coalitions: torch.Generator, data: RandomStream, loader: object, plan: dict[str, Any]
    ):
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.records = 0
        self.coalitions = coalitions
        self.data = data
        self._generators = list(loader_generators(loader))
        self._resumable = loader if isinstance(loader, ResumableData) else None
        self._plan = plan
        self.start_epoch()

    def start_epoch(self) -> None:
        """Remember the random state from which the data of this epoch can be drawn again."""
        self._data_at_start = self.data.state
        self._generators_at_start = [generator.get_state() for generator in self._generators]

    def open_epoch(self) -> int:
        """Batches that the data will not give again; call it before each epoch is iterated."""
        self.start_epoch()
        if self._resumable is None:
            return 0
        if not self.batch:
            self._resumable.set_epoch(self.epoch)
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "records": self.records,
            "coalitions": self.coalitions.get_state(),
            "data_at_start": self._data_at_start,
            "generators_at_start": self._generators_at_start,
            "loader": None if self._resumable is None else self._resumable.state_dict(),
            "plan": self._plan,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there; the data is put to the start of the epoch, to be replayed, or there itself.

        Raises:
            TrainingError: The checkpoint is of a run of another length, or with other data.
        """
        changed = {
            name: (state["plan"].get(name), value)
            for name, value in self._plan.items()
            if state["plan"].get(name) != value
        }
        if changed:
            raise TrainingError(
                f"settings of the run changed (before, now): {changed}; a run cannot change on the "
                "way. Resume with the same data and settings, or start anew elsewhere."
            )
        loader = state.get("loader")
        if (loader is None) != (self._resumable is None):
            raise TrainingError(
                "the run's data is of another kind than before (a stream of shards, or anything "
                "else); resume with the same data, or start anew elsewhere."
            )
        if self._resumable is not None and loader is not None:
            self._resumable.load_state_dict(loader)
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.records = state["records"]
        self.coalitions.set_state(state["coalitions"])
        self.data.state = state["data_at_start"]
        for generator, saved in zip(self._generators, state["generators_at_start"], strict=True):
            generator.set_state(saved)
        self.start_epoch()


def loader_generators(loader: object) -> Iterator[torch.Generator]:
    """Generators that a DataLoader and its samplers hold, each once."""
    found: dict[int, torch.Generator] = {}
    waiting: list[Any] = [loader] if isinstance(loader, DataLoader) else []
    while waiting:
        part = waiting.pop()
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found.setdefault(id(generator), generator)
        inner = (getattr(part, name, None) for name in ("batch_sampler", "sampler"))
        waiting.extend(child for child in inner if child is not None and child is not part)
    yield from found.values()
