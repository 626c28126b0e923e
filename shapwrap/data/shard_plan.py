"""Who reads what: an epoch of shards, shared out among processes and their workers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shapwrap.errors import ArgumentError


class Span(NamedTuple):
    """Consecutive samples of one shard."""

    shard: int
    first: int
    last: int | None
    """One past the last; None for the end of the shard, wherever that is."""


class Share(NamedTuple):
    """What one worker reads in an epoch."""

    spans: list[Span]
    batches: list[int]
    """Their sizes."""


@dataclass(frozen=True)
class ShardPlan:
    """Shares of an epoch, computed alike in every process, without a word between them.

    The samples of all shards, the shards in the epoch's order, are one long row. Each process has
    a piece of it, all of the same length, and each worker a piece of that: every sample is read
    once, and a shard on a border twice. With `drop_last` less than one global batch is left over at
    the end; otherwise the row is filled up from its start until it divides by the number of
    processes.

    Where only the total is known, each worker has whole shards instead.
    """

    num_shards: int
    sizes: tuple[int, ...] | None
    """Samples in each shard; None if only the total is known."""
    total: int
    batch_size: int
    drop_last: bool
    num_workers: int
    """Per process, at least 1."""
    num_processes: int
    seed: int | None
    """Of the order of shards; None for the order given."""

    @property
    def samples(self) -> int:
        """Samples of one process, before any batch is dropped."""
        down, left = divmod(self.total, self.num_processes)
        return down if self.drop_last or not left else down + 1

    @property
    def batches(self) -> int:
        """Batches of one process in an epoch."""
        whole, left = divmod(self.samples, self.batch_size)
        return whole if self.drop_last or not left else whole + 1

    def check(self) -> None:
        """Raise unless everybody has something to do.

        Raises:
            ArgumentError: Less than a batch a process, or too few shards to hand out whole.
        """
        if not self.batches:
            raise ArgumentError(
                f"{self.total} samples are less than one batch of {self.batch_size} for each of "
                f"{self.num_processes} processes; make batches smaller, or set drop_last=False."
            )
        readers = self.num_processes * self.num_workers
        if self.sizes is None and self.num_shards < readers:
            raise ArgumentError(
                f"{self.num_shards} shards cannot be handed out to {readers} workers; pass the "
                "sizes of all shards, so that they can be divided, or use fewer workers."
            )

    def order(self, epoch: int) -> list[int]:
        """The order of shards."""
        shards = list(range(self.num_shards))
        if self.seed is not None:
            random.Random(f"shards {self.seed} {epoch}").shuffle(shards)
        return shards

    def share(self, epoch: int, process: int, worker: int) -> Share:
        """What this worker of this process reads; batch j of a process is by worker j % workers."""
        batches = self._batches_of(worker)
        if self.sizes is None:
            own, _ = self._whole_shards(epoch, process, worker)
            return Share([Span(shard, 0, None) for shard in own], batches)
        return Share(self._spans(epoch, *self._piece(process, worker)), batches)

    def everything(self, epoch: int, process: int, worker: int) -> list[Span]:
        """All samples, those of this worker first: what takes the place of unusable ones."""
        if self.sizes is None:
            own, others = self._whole_shards(epoch, process, worker)
            return [Span(shard, 0, None) for shard in (*own, *others)]
        return self._spans(epoch, self._piece(process, worker)[0], self.total)

    def _whole_shards(self, epoch: int, process: int, worker: int) -> tuple[list[int], list[int]]:
        """Shards of this worker, and those of all others."""
        order = self.order(epoch)
        own = order[process * self.num_workers + worker :: self.num_processes * self.num_workers]
        others = set(order).difference(own)
        return own, [shard for shard in order if shard in others]

    def _piece(self, process: int, worker: int) -> tuple[int, int]:
        """Where this worker's piece of the row starts, and how long it is."""
        lengths = [sum(self._batches_of(number)) for number in range(self.num_workers)]
        # What makes no batch is left to the first worker, in the place of unreadable samples.
        lengths[0] += self.samples - sum(lengths)
        return process * self.samples + sum(lengths[:worker]), lengths[worker]

    def _batches_of(self, worker: int) -> list[int]:
        sizes: list[int] = []
        for batch in range(worker, self.batches, self.num_workers):
            sizes.append(min(self.batch_size, self.samples - batch * self.batch_size))
        return sizes

    def _spans(self, epoch: int, start: int, length: int) -> list[Span]:
        sizes: Sequence[int] = self.sizes or ()
        order = self.order(epoch)
        spans: list[Span] = []
        position = 0
        start %= self.total
        # Twice: the row is filled up from its start.
        for shard in [*order, *order]:
            first = max(start - position, 0)
            last = min(start + length - position, sizes[shard])
            if first < last:
                spans.append(Span(shard, first, last))
            position += sizes[shard]
        return spans
