"""Generators of a DataLoader, and an order of its samples that no process number changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


def loader_generators(loader: object) -> Iterator[torch.Generator]:
    """Generators that a DataLoader and its samplers hold, each once."""
    found: dict[int, torch.Generator] = {}
    for part in _parts(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found.setdefault(id(generator), generator)
    yield from found.values()


@contextmanager
def generators_kept(loader: object) -> Iterator[None]:
    """What a DataLoader draws inside, it draws again afterwards."""
    before = [(generator, generator.get_state()) for generator in loader_generators(loader)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def unseeded_samplers(loader: object) -> list[Any]:
    """Samplers that could have a generator and have none, so that they draw from global states."""
    return [
        part
        for part in _parts(loader)
        if part is not loader and getattr(part, "generator", part) is None
    ]


@contextmanager
def ordered(loader: object, seed: int) -> Iterator[None]:
    """Inside, samplers without a generator have one with this seed.

    The order of an epoch then is the same in every process and for every number of them.
    """
    samplers = unseeded_samplers(loader)
    for sampler in samplers:
        sampler.generator = torch.Generator().manual_seed(seed)
        if hasattr(sampler, "initial_seed"):
            # One of accelerate's own, which sets the generator's seed itself, from this.
            sampler.initial_seed = seed
    try:
        yield
    finally:
        for sampler in samplers:
            sampler.generator = None


def samples_per_batch(loader: object) -> int | None:
    """Samples that all processes together take from the order a batch; None if that is unknown."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    total = getattr(loader, "total_batch_size", None)
    return total if isinstance(total, int) else None


def _parts(loader: object) -> Iterator[Any]:
    waiting: list[Any] = [loader] if isinstance(loader, DataLoader) else []
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        inner = (getattr(part, name, None) for name in ("batch_sampler", "sampler"))
        waiting.extend(child for child in inner if child is not None and child is not part)
