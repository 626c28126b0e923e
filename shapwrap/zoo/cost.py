"""What a model would cost, known without its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shapwrap.flops import count_operations
from shapwrap.zoo.constructor import Changes, changed_constructors

# One call of a small layer costs about as much time as this many multiply-adds in a large one.
LAYER_OVERHEAD = 400_000
# Batch norm on a map of one pixel needs two images.
PROBE_BATCH = 2


@dataclass(frozen=True)
class Cost:
    """Of one image."""

    parameters: int
    work: float
    """Multiply-adds, with an allowance for each layer; infinity where nobody counted."""

    def within(self, parameters: float, work: float) -> bool:
        """Whether both are small enough."""
        return self.parameters <= parameters and self.work <= work


@dataclass(frozen=True)
class Probe:
    """Builds a model where tensors have no data, and counts."""

    build: Callable[[], nn.Module]
    channels: int
    device: str

    def model(self, changes_of: Mapping[type, Changes]) -> nn.Module:
        """The model with changed constructor arguments."""
        with changed_constructors(changes_of), torch.device(self.device):
            return self.build()

    def cost(self, changes_of: Mapping[type, Changes], size: tuple[int, int]) -> Cost | None:
        """None where the model cannot be built so, or refuses images of this size."""
        try:
            return cost_of(self.model(changes_of), self.channels, size, self.device)
        except Exception:
            # Whatever a foreign constructor raises on arguments it was not meant for.
            return None


def cost_of(model: nn.Module, channels: int, size: tuple[int, int], device: str) -> Cost:
    """Cost of one image, from one training pass that is left to fail as it may.

    Training is the stricter test of an image size: some classes have auxiliary heads in it.
    """
    model.train()
    with torch.no_grad(), torch.device(device):
        work = count_operations(lambda: model(torch.zeros(PROBE_BATCH, channels, *size)))
    return Cost(parameters_of(model), work / PROBE_BATCH + overhead_of(model))


def parameters_of(model: nn.Module) -> int:
    """Their number."""
    return sum(parameter.numel() for parameter in model.parameters())


def overhead_of(model: nn.Module) -> float:
    """Time that its layers take however small they are, in multiply-adds."""
    layers = sum(1 for module in model.modules() if not any(True for _ in module.children()))
    return layers * LAYER_OVERHEAD
