"""Batch statistics belong to clean images: masked ones neither set nor use them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts exactly these modules (not their children) in eval mode, and back as they were."""
    switched = [module for module in modules if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All batch normalisation layers, synchronised ones included."""
    return [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
