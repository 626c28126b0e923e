"""Batch statistics belong to clean images: masked ones neither set nor use them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def without_recomputation(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off inside.

    It runs layers again during the backward pass, when a mode that was switched for the forward
    pass alone is already back.
    """
    recomputing: list[Any] = [m for m in model.modules() if getattr(m, "grad_checkpointing", False)]
    for module in recomputing:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in recomputing:
            module.grad_checkpointing = True


@contextmanager
def clean_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses its running statistics inside, and does not move them."""
    layers = [layer for layer in batch_norms(model) if layer.training]
    if not layers:
        yield
        return
    with evaluation_mode(layers), without_recomputation(model):
        yield


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All batch normalisation layers, synchronised ones included."""
    return [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
