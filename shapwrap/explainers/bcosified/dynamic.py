"""Layers whose weights depend on their input, and the mode in which these weights are constants."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from shapwrap.errors import ArgumentError


class Dynamic:
    """A layer that is a linear map W(x) of its input x, without bias."""

    detached: bool = False
    """Whether gradients take W(x) for a constant, so that the gradient is W(x) itself."""


@contextmanager
def explanation_mode(module: nn.Module) -> Iterator[None]:
    """Gradients through the module are its linear map inside, and as they were outside.

    What the module computes is the same. ReLUs and average pools are linear maps given their input
    already; batch normalisation is one in eval mode, and in train mode given its statistics.
    """
    switched = [
        layer for layer in module.modules() if isinstance(layer, Dynamic) and not layer.detached
    ]
    for layer in switched:
        layer.detached = True
    try:
        yield
    finally:
        for layer in switched:
            del layer.detached


class BcosLayer(Dynamic):
    """A dynamic layer with an exponent."""

    b: float
    """B: 1 for a plain linear map."""


def set_b(module: nn.Module, b: float) -> None:
    """Gives all B-cos layers of a module this exponent.

    Raises:
        ArgumentError: Below 1, or not finite.
    """
    check_b(b)
    for layer in module.modules():
        if isinstance(layer, BcosLayer):
            layer.b = float(b)


def check_b(b: float) -> None:
    """Raise unless the exponent is one.

    Raises:
        ArgumentError: Below 1, or not finite.
    """
    if not 1 <= b < math.inf:
        raise ArgumentError(f"b is {b!r}; expected a number, at least 1 (1 is a linear layer).")
