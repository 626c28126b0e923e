"""Samples of shards as they are stored, read with webdataset from wherever they lie."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from shapwrap.data.shard_files import webdataset_needed
from shapwrap.data.shard_plan import Span
from shapwrap.data.skipped import Skip

IMAGES = ("jpg", "jpeg", "png", "webp")
FIELDS = {*IMAGES, "txt", "json"}


class StoredSample(NamedTuple):
    """One sample, not decoded yet."""

    key: str
    fields: dict[str, bytes]
    """By extension."""


def read_span(shard: str, span: Span, size: int | None) -> Iterator[StoredSample | Skip]:
    """The samples of a span; what cannot be read comes as a `Skip`.

    Args:
        shard: Path, URL or command.
        span: Which of its samples.
        size: How many it should have, if that is known.
    """
    with webdataset_needed():
        from webdataset.gopen import gopen, set_options
        from webdataset.tariterators import group_by_keys, tar_file_expander
    errors: list[Exception] = []

    def remember(error: Exception) -> bool:
        errors.append(error)
        return True

    read = 0
    try:
        stream: Any = gopen(shard)
        with stream:
            files = tar_file_expander([{"url": shard, "stream": stream}], handler=remember)
            samples = group_by_keys(files, suffixes=FIELDS, handler=remember)
            cut_off = True
            try:
                for read, sample in enumerate(samples, start=1):
                    key = sample["__key__"]
                    if span.last is not None and read > span.last:
                        if span.last == size:
                            yield Skip("beyond the size of its shard", f"{shard}: {key}")
                        return
                    if read > span.first:
                        fields = {name: sample[name] for name in FIELDS & sample.keys()}
                        yield StoredSample(key, fields)
                # So that a command can end, and say whether it was well.
                while stream.read(1 << 16):
                    pass
                cut_off = False
            finally:
                # A command whose output is not wanted any more may complain.
                set_options(stream, ignore_errors=cut_off)
    except OSError as error:
        errors.append(error)
    missing = 0 if span.last is None else span.last - max(span.first, read)
    where = f"{shard} ({errors[0]})" if errors else shard
    yield from itertools.repeat(Skip("not in its shard", where), max(missing, 0))
    if errors and missing <= 0:
        yield Skip("part of a shard that cannot be read whole", where)


def shuffled(
    samples: Iterable[StoredSample | Skip], buffer_size: int, generator: random.Random
) -> Iterator[StoredSample | Skip]:
    """All of them, in an order mixed over `buffer_size` samples; 1 keeps the order."""
    buffer: list[StoredSample | Skip] = []
    for sample in samples:
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        place = generator.randrange(buffer_size)
        given, buffer[place] = buffer[place], sample
        yield given
    generator.shuffle(buffer)
    yield from buffer
