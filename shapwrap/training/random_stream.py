"""A stream of random numbers of its own for the data, apart from dropout and coalitions."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _capture() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the state users' code draws from
        "torch": torch.get_rng_state(),
    }


def _restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])


class RandomStream:
    """The global random states of Python, numpy and torch's CPU, as one stream among several.

    Shuffling and augmentation draw from global states. Giving them a stream that nothing else
    draws from lets a resumed run replay the data of an epoch without replaying the model.
    """

    def __init__(self, seed: int):
        with global_states_kept():
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            self.state = _capture()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draws inside come from this stream; the global states are back afterwards."""
        with global_states_kept():
            _restore(self.state)
            try:
                yield
            finally:
                self.state = _capture()


@contextmanager
def global_states_kept() -> Iterator[None]:
    """The global random states are afterwards what they were before."""
    before = _capture()
    try:
        yield
    finally:
        _restore(before)
