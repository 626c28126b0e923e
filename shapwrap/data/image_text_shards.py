"""Batches of image-text pairs, streamed from WebDataset shards."""

import copy
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shapwrap.arguments import check_at_least
from shapwrap.clip.texts import Tokenizer
from shapwrap.data.image_text_sample import Captions, Transform, decode, stacked
from shapwrap.data.shard_files import Shards, base_name, expand_shards, shard_sizes, total_of
from shapwrap.data.shard_plan import ShardPlan, Span
from shapwrap.data.shard_reader import StoredSample, read_span, shuffled
from shapwrap.data.skipped import Skip, Skipped
from shapwrap.errors import ArgumentError, TrainingError

HOPELESS = 50_000
"""Samples in a row that were read and cannot be used: no accident, but another layout."""


class ImageTextShards:
    """Batches (images float [B, C, H, W], token ids int64 [B, L]); each iteration is one epoch.

    Samples are an image (.jpg, .jpeg, .png, .webp) and captions ("captions" of a .json, or a .txt,
    or "caption" of the .json): what img2dataset writes, and so CC3M's and CC12M's published shards.

    In an epoch every sample is given once, by one worker of one process. Sample order, captions
    and whatever a transform draws from the global random states depend on the seed, the epoch and
    the sample alone, so `load_state_dict` goes on bit for bit, without decoding what was given
    before. A sample that cannot be used is skipped and counted in `skipped`, and an unused or
    repeated one takes its place, so that batches stay whole and processes in step; one
    `SkippedSampleWarning` says so at the end of the epoch.

    Args:
        shards: Paths, globs, brace patterns, URLs (`https:`, `gs:`, `hf:`), `pipe:` commands.
        transform: From a PIL image in RGB to a float tensor, all of one shape.
        tokenizer: From strings to token ids; without one a batch has the captions as strings.
        batch_size: Pairs a batch and process.
        sizes: Samples in each shard, by its name; or path or URL of a sizes.json with that; or
            the number in all shards together, if more is not known: then each worker reads whole
            shards, so that "once an epoch" holds as far as shards are of one size. None for the
            sizes.json beside local shards, or the headers of the files.
        captions: "first", or "random" for a fresh one each epoch.
        shuffle: Mix shards, and samples in the buffer.
        buffer_size: Stored samples that a worker mixes.
        seed: Of order, captions and transforms.
        drop_last: Leave out what does not fill a batch of every process, other samples each epoch.
            Otherwise the last batch is smaller, and where the total does not divide by the
            number of processes, fewer samples than processes come twice.
        num_workers: Processes that read and decode, for each training process; 0 for none.
        pin_memory: As in torch's DataLoader.

    Raises:
        ArgumentError: No shards, files that are not there, a remote shard of unknown size, fewer
            samples than a batch, or a number out of range.
        MissingDependencyError: webdataset is not installed.
    """

    def __init__(
        self,
        shards: Shards,
        transform: Transform,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 64,
        sizes: Mapping[str, int] | str | os.PathLike[str] | int | None = None,
        captions: Captions | str = "first",
        shuffle: bool = True,
        buffer_size: int = 1000,
        seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        check_at_least("batch_size", batch_size, 1)
        check_at_least("buffer_size", buffer_size, 1)
        check_at_least("num_workers", num_workers, 0)
        if captions not in ("first", "random"):
            raise ArgumentError(f"captions is {captions!r}; expected 'first' or 'random'.")
        self.shards = expand_shards(shards)
        counted = None if isinstance(sizes, int) else shard_sizes(self.shards, sizes)
        self.skipped = Skipped()
        self._transform, self._tokenizer = transform, tokenizer
        self._captions = captions
        self._buffer_size = buffer_size if shuffle else 1
        self._seed, self._num_workers, self._pin_memory = seed, num_workers, pin_memory
        self._plan = ShardPlan(
            num_shards=len(self.shards),
            sizes=None if counted is None else tuple(counted),
            total=total_of([sizes] if isinstance(sizes, int) else counted or []),
            batch_size=batch_size,
            drop_last=drop_last,
            num_workers=max(1, num_workers),
            num_processes=1,
            seed=seed if shuffle else None,
        )
        self._plan.check()
        self._process = 0
        self._place = _Place(0, 0, (0,) * self._plan.num_workers)
        self._resuming = False

    @property
    def num_samples(self) -> int:
        """Samples in all shards, as counted or given."""
        return self._plan.total

    def __len__(self) -> int:
        """Batches of one process in a whole epoch."""
        return self._plan.batches

    def split(self, process_index: int, num_processes: int) -> "ImageTextShards":
        """A copy with the share of one process; the trainers call it.

        Raises:
            ArgumentError: Fewer samples than a batch for each process.
        """
        if not 0 <= process_index < num_processes:
            raise ArgumentError(
                f"process_index is {process_index}; expected 0 to {num_processes - 1}."
            )
        part = copy.copy(self)
        fields = {**vars(self._plan), "num_processes": num_processes}
        part._plan, part._process = ShardPlan(**fields), process_index
        part._plan.check()
        return part

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its start."""
        self._place = _Place(epoch, 0, (0,) * self._plan.num_workers)
        self._resuming = False

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: after the last batch that it gave."""
        return {
            "place": tuple(self._place),
            "skipped": self.skipped.state_dict(),
            "depends_on": self._what_order_depends_on(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on there, with what is left of the epoch.

        Raises:
            TrainingError: Other shards or settings.
        """
        self._check_same(state, set())
        self._place = _Place(*state["place"])
        self.skipped.load_state_dict(state["skipped"])
        self._resuming = True

    def take_over(self, states: Sequence[dict[str, Any]]) -> None:
        """Count what the processes of another number of them have skipped, in the first process.

        Raises:
            TrainingError: Other shards or settings, beside batch size, workers and processes.
        """
        for state in states:
            self._check_same(state, {"batch_size", "num_workers", "num_processes", "process"})
        if self._process == 0:
            self.skipped.sum_up([state["skipped"] for state in states])

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Images, and token ids or captions.

        Raises:
            TrainingError: There is no sample that can be used, or 50,000 in a row cannot.
        """
        if not self._resuming:
            self.set_epoch(self._place.epoch)
        self._resuming = False
        loader = DataLoader(
            _WorkerStream(self, self._place),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            collate_fn=_as_it_is,
            # Nothing draws from it; without it the loader would draw from the global state.
            generator=torch.Generator().manual_seed(self._seed),
        )
        try:
            for given in loader:
                read = list(self._place.read)
                read[given.worker] = given.read
                self._place = _Place(self._place.epoch, self._place.batch + 1, tuple(read))
                self.skipped.add(Skip(*skip) for skip in given.skips)
                yield given.images, given.texts
            self.set_epoch(self._place.epoch + 1)
        finally:
            self.skipped.warn_once()

    def _check_same(self, state: dict[str, Any], free: set[str]) -> None:
        now, before = self._what_order_depends_on(), state["depends_on"]
        changed = {
            name: (before.get(name), now[name])
            for name in sorted(now.keys() - free)
            if before.get(name) != now[name]
        }
        if changed:
            raise TrainingError(
                f"the stream of shards changed (before, now): {changed}; resume with the same "
                "shards and settings, or start anew elsewhere."
            )

    def _what_order_depends_on(self) -> dict[str, Any]:
        plan = {**vars(self._plan), "process": self._process, "captions": self._captions}
        return {
            **plan,
            "shards": list(map(base_name, self.shards)),
            "buffer": self._buffer_size,
            "seeds": self._seed,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


class _Place(NamedTuple):
    """How far an epoch has come."""

    epoch: int
    batch: int
    read: tuple[int, ...]
    """Stored samples that each worker has used up."""


class _Given(NamedTuple):
    """One batch, and how far its worker has come."""

    images: Tensor
    texts: Any
    worker: int
    read: int
    skips: list[tuple[str, ...]]


class _Pair(NamedTuple):
    """One sample, decoded, how far its worker has come, and what it skipped on the way."""

    image: Tensor
    caption: str
    read: int
    skips: list[Skip]


class _WorkerStream(IterableDataset[_Given]):
    """The batches of one worker, from its place on."""

    def __init__(self, shards: ImageTextShards, place: _Place):
        super().__init__()
        self._shards, self._place = shards, place

    def __iter__(self) -> Iterator[_Given]:
        info = torch.utils.data.get_worker_info()
        plan = self._shards._plan
        # The loader asks its workers in turn, the first one first, wherever the epoch is.
        worker = ((0 if info is None else info.id) + self._place.batch) % plan.num_workers
        share = plan.share(self._place.epoch, self._shards._process, worker)
        given = len(range(worker, self._place.batch, plan.num_workers))
        pairs = self._pairs(share.spans, worker)
        for size in share.batches[given:]:
            batch = [next(pairs) for _ in range(size)]
            skips = [tuple(skip) for pair in batch for skip in pair.skips]
            yield _Given(*self._collated(batch), worker, batch[-1].read, skips)

    def _pairs(self, spans: list[Span], worker: int) -> Iterator[_Pair]:
        """What this worker has not given yet; for want of that all samples, its own first."""
        shards, epoch = self._shards, self._place.epoch
        key = f"samples {shards._seed} {epoch} {shards._process} {worker}"
        generator = random.Random(key)
        before, read = self._place.read[worker], 0
        skips: list[Skip] = []
        unusable, last = 0, None
        for again in itertools.count():
            usable = read < before
            for sample in shuffled(self._stored(spans), shards._buffer_size, generator):
                read += 1
                if read <= before:
                    continue
                decoded = self._decoded(sample)
                if isinstance(decoded, Skip):
                    # Those of a second round are counted already, here or by their own worker.
                    skips += [] if again else [decoded]
                    last = decoded
                    # Of a shard that cannot be opened nothing was read, and others may be fine.
                    unusable += isinstance(sample, StoredSample)
                    if unusable == HOPELESS:
                        raise self._nothing_usable(unusable, last)
                else:
                    usable, unusable = True, 0
                    yield _Pair(*decoded, read, skips)
                    skips = []
            if again and not usable:
                raise self._nothing_usable(shards.num_samples, last)
            spans = shards._plan.everything(epoch, shards._process, worker)

    def _nothing_usable(self, num: int, last: Skip | None) -> TrainingError:
        said = "" if last is None else f", the last {last.reason}: {last.key}"
        return TrainingError(
            f"none of {num} samples of {base_name(self._shards.shards[0])} and so on can be used"
            f"{said}; expected images (.jpg, .png, .webp) with captions (.txt, .json)."
        )

    def _stored(self, spans: list[Span]) -> Iterator[StoredSample | Skip]:
        sizes = self._shards._plan.sizes
        for span in spans:
            size = None if sizes is None else sizes[span.shard]
            yield from read_span(self._shards.shards[span.shard], span, size)

    def _decoded(self, sample: StoredSample | Skip) -> tuple[Tensor, str] | Skip:
        if isinstance(sample, Skip):
            return sample
        shards = self._shards
        seed = f"{shards._seed} {self._place.epoch}"
        return decode(sample, shards._transform, shards._captions, seed)

    def _collated(self, pairs: list[_Pair]) -> tuple[Tensor, Any]:
        captions = [pair.caption for pair in pairs]
        tokenizer = self._shards._tokenizer
        images = stacked([pair.image for pair in pairs])
        return images, tokenizer(captions) if tokenizer else captions
