"""Where a run is, and the random state of what it does next."""

from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed

from shapwrap.errors import TrainingError
from shapwrap.training.loader_order import loader_generators, samples_per_batch
from shapwrap.training.random_stream import (
    RandomStream,
    derived_seed,
    global_states,
    set_global_states,
)
from shapwrap.training.resumable_data import ResumableData


class Split(NamedTuple):
    """How an optimizer step is shared out; a resumed run may do it otherwise."""

    processes: int
    process: int
    batches: int
    """Of one process in an epoch."""
    accumulation: int
    """Batches of one process in an optimizer step."""

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches // self.accumulation)


class Position:
    """Step, epoch and batch of a run with its random states; saved in every checkpoint.

    Args:
        seed: Of the run.
        loader: The training data; a loader may have generators of its own, resumable data a state.
        split: What this process does of it.
        plan: What training depends on; a run can only be resumed with the same.
        device: Where dropout draws.
    """

    def __init__(
        self, seed: int, loader: object, split: Split, plan: dict[str, Any], device: torch.device
    ):
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.records = 0
        self.data = RandomStream(seed)
        self._seed, self._split, self._device = seed, split, device
        own = seed + 1000 * split.process
        self.coalitions = torch.Generator().manual_seed(own)
        set_seed(own)
        self._generators = list(loader_generators(loader))
        self._resumable = loader if isinstance(loader, ResumableData) else None
        self._samples = samples_per_batch(loader)
        taken = None if self._samples is None else self._samples * split.accumulation
        self._plan = {**plan, "steps_per_epoch": split.steps, "samples_per_step": taken}
        self.start_epoch()

    def start_epoch(self) -> None:
        """Go to the random state of the data where this epoch begins."""
        self.data.start(self.epoch)
        self._generators_at_start = [generator.get_state() for generator in self._generators]

    def open_epoch(self) -> int:
        """Batches that the data will not give again; call it before each epoch is iterated."""
        self.start_epoch()
        if self._resumable is None:
            return 0
        if not self.batch:
            self._resumable.set_epoch(self.epoch)
        return self.batch

    def mixing(self) -> torch.Generator:
        """For the mixup of the batch that is next, the same whatever else was drawn before."""
        place = (self._seed, self.epoch, self.batch, self._split.process)
        return torch.Generator().manual_seed(derived_seed("mixing", *place))

    def shared_state(self) -> dict[str, Any]:
        """What is the same in all processes."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "records": self.records,
            "generators_at_start": self._generators_at_start,
            "split": self._split._replace(process=0)._asdict(),
            "plan": self._plan,
        }

    def own_state(self) -> dict[str, Any]:
        """What belongs to this process."""
        return {
            "coalitions": self.coalitions.get_state(),
            "random": global_states(),
            "device": None if self._device_random is None else self._device_random.get_rng_state(),
            "stream": None if self._resumable is None else self._resumable.state_dict(),
        }

    def load(self, shared: dict[str, Any], processes: list[dict[str, Any]]) -> None:
        """Go there; the data is put to the start of the epoch, to be replayed, or there itself.

        Args:
            shared: As saved.
            processes: The own states of all processes that there were. If there are as many now,
                each goes on where it was; otherwise each begins new random states, derived from
                seed, step and numbers of processes.

        Raises:
            TrainingError: The checkpoint is of another run, or with other data, or in the middle of
                an epoch that cannot be shared out anew.
        """
        before = Split(**shared["split"])
        self._check_plan(shared["plan"], before)
        streams = [own["stream"] for own in processes]
        if (streams[0] is None) != (self._resumable is None):
            raise TrainingError(
                "the run's data is of another kind than before (a stream of shards, or anything "
                "else); resume with the same data, or start anew elsewhere."
            )
        self.step, self.epoch, self.batch = shared["step"], shared["epoch"], shared["batch"]
        self.records = shared["records"]
        for generator, saved in zip(self._generators, shared["generators_at_start"], strict=True):
            generator.set_state(saved)
        if before.processes == self._split.processes:
            self._go_on(processes[self._split.process])
        else:
            self._share_anew(before, streams)
        self.start_epoch()

    def _go_on(self, own: dict[str, Any]) -> None:
        self.coalitions.set_state(own["coalitions"])
        set_global_states(own["random"])
        if self._device_random is not None and own["device"] is not None:
            self._device_random.set_rng_state(own["device"])
        if self._resumable is not None:
            self._resumable.load_state_dict(own["stream"])

    def _share_anew(self, before: Split, streams: list[Any]) -> None:
        now = self._split
        if self.batch == before.batches:
            self.batch = now.batches
        elif self.batch and self._samples is None:
            raise TrainingError(
                f"the checkpoint of step {self.step} is in the middle of epoch {self.epoch + 1}, "
                f"after {self.batch} of {before.batches} batches of {before.processes} processes, "
                f"and what they have not seen of this data cannot be shared out among "
                f"{now.processes}. Resume with {before.processes} processes, or, with any number, "
                "from a checkpoint at the end of an epoch (delete newer ones)."
            )
        else:
            self.batch = self.batch // before.accumulation * now.accumulation
        place = (self._seed, self.step, before.processes, now.processes, now.process)
        self.coalitions.manual_seed(derived_seed("coalitions", *place))
        set_seed(derived_seed("model", *place) % 2**32)
        if self._resumable is not None:
            self._resumable.take_over(streams)
            self._resumable.set_epoch(self.epoch)

    def _check_plan(self, plan: dict[str, Any], before: Split) -> None:
        then, now = dict(plan), dict(self._plan)
        if before.processes == self._split.processes:
            then |= before._replace(process=0)._asdict()
            now |= self._split._replace(process=0)._asdict()
        changed = {name: (then.get(name), now[name]) for name in now if then.get(name) != now[name]}
        if changed:
            hint = (
                ""
                if before.processes == self._split.processes
                else f" There were {before.processes} processes and are {self._split.processes}: "
                "change the batch size or accumulation so that a step takes as many samples."
            )
            raise TrainingError(
                f"settings of the run changed (before, now): {changed}; a run cannot change on the "
                f"way. Resume with the same data and settings, or start anew elsewhere.{hint}"
            )

    @property
    def _device_random(self) -> Any:
        """Where the random state of the device is found; None on a CPU."""
        return None if self._device.type == "cpu" else torch.get_device_module(self._device.type)
