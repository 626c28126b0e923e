"""Random draws of a transform that depend on one number alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from shapwrap.training.random_stream import global_states_kept


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random states are seeded from this number inside, and afterwards what they were."""
    with global_states_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the state that transforms draw from
        # Not torch.manual_seed, which would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        yield
