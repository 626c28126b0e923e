"""A stream of random numbers of its own for the data, apart from dropout and coalitions."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits for this purpose: other parts, another seed, in every process the same."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def global_states() -> dict[str, Any]:
    """The global random states of Python, numpy and torch's CPU."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the state users' code draws from
        "torch": torch.get_rng_state(),
    }


def set_global_states(state: dict[str, Any]) -> None:
    """Put them there."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])


class RandomStream:
    """The global random states of Python, numpy and torch's CPU, as one stream among several.

    Shuffling and augmentation draw from global states. Giving them a stream that nothing else
    draws from lets a resumed run replay the data of an epoch without replaying the model.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self.start(0)

    def start(self, epoch: int) -> None:
        """Go to where this epoch begins, which depends on the seed and the epoch alone."""
        seed = derived_seed("data", self._seed, epoch)
        with global_states_kept():
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # Not torch.manual_seed, which would seed every GPU as well.
            torch.default_generator.manual_seed(seed)
            self._state = global_states()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draws inside come from this stream; the global states are back afterwards."""
        with global_states_kept():
            set_global_states(self._state)
            try:
                yield
            finally:
                self._state = global_states()


@contextmanager
def global_states_kept() -> Iterator[None]:
    """The global random states are afterwards what they were before."""
    before = global_states()
    try:
        yield
    finally:
        set_global_states(before)
