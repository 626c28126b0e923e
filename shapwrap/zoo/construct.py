"""One random instance of a model, small enough to be checked here."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.saving.structure import without_data
from shapwrap.zoo.catalogue import (
    ModelName,
    builder,
    class_name,
    defining_module,
    has_classifier,
    input_size,
    quiet,
    trunk_of,
)
from shapwrap.zoo.constructor import Arguments, changed_constructors, record_arguments
from shapwrap.zoo.cost import Cost, Probe, cost_of, overhead_of, parameters_of
from shapwrap.zoo.shrink import Limits, Plan, shrink
from shapwrap.zoo.weights import perturb

BATCH = 2
CALIBRATION_BATCH = 8
DEFAULT_REDUCTION = 32
LARGEST_ROUNDING = 3e-6
"""Of a usual network, in float32. Random weights can amplify rounding until no check means much;
such a network is checked in float64."""


@dataclass(frozen=True)
class Specimen:
    """A model to check, and what the full model is."""

    model: nn.Module
    """Random weights, in train mode as libraries build it."""
    channels: int
    image_size: tuple[int, int]
    class_name: str
    module: str
    parameters: int
    """Of the full model."""
    shrunken: str
    """What was changed, in words; "" for the model as it is."""
    has_classifier: bool
    dtype: torch.dtype = torch.float32

    def images(self, seed: int, size: tuple[int, int] | None = None, batch: int = BATCH) -> Tensor:
        """Noise, [B, C, H, W], as normalised images."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.channels, *(size or self.image_size))
        return torch.randn(shape, generator=generator).to(self.dtype)


def construct(name: ModelName, *, seed: int = 0, limits: Limits | None = None) -> Specimen:
    """Builds a model with random weights; above `limits` as a smaller instance of its class."""
    build = builder(name)
    with quiet():
        limits = limits or Limits()
        probe, full, outer = _probe(name, build, limits)
        plan = full
        if not full.cost.within(limits.parameters, limits.work):
            arguments_of, reduction = _arguments(probe, outer), _reduction(outer)
            plan = shrink(probe, full, arguments_of, reduction, limits)
            if plan is full:
                # Perhaps it cannot run without data.
                probe = replace(probe, device="cpu")
                plan = shrink(probe, full, arguments_of, reduction, limits)
        with torch.random.fork_rng(devices=[]), changed_constructors(plan.changes_of):
            torch.manual_seed(seed)
            model = build()
        specimen = Specimen(
            model=model,
            channels=probe.channels,
            image_size=plan.image_size,
            class_name=class_name(outer),
            module=defining_module(name, outer),
            parameters=full.cost.parameters,
            shrunken=str(plan),
            has_classifier=has_classifier(name, outer),
        )
        perturb(
            model,
            specimen.images(seed + 1, batch=CALIBRATION_BATCH),
            torch.Generator().manual_seed(seed),
        )
        if _rounding_noise(model, specimen.images(seed + 2)) > LARGEST_ROUNDING:
            words = ", ".join(filter(None, (specimen.shrunken, "float64")))
            specimen = replace(specimen, dtype=torch.float64, shrunken=words)
            model.double()
    return specimen


@torch.no_grad()
def _rounding_noise(model: nn.Module, images: Tensor) -> float:
    """Relative change of the output when the same images come in a batch twice as large."""
    with evaluation_mode(model.modules()):
        small, large = model(images), model(torch.cat((images, images)))
    if not isinstance(small, Tensor):
        return 0.0
    return float((large[: len(images)] - small).abs().max() / small.abs().max().clamp(min=1e-12))


def count_parameters(name: ModelName) -> int:
    """Parameters of the full model, which is built without data where that is possible."""
    with quiet():
        return parameters_of(without_data(builder(name)))


def _probe(
    name: ModelName, build: Callable[[], nn.Module], limits: Limits
) -> tuple[Probe, Plan, nn.Module]:
    """How to try changes, the model as it is with its cost, and the model without data."""
    model = without_data(build)
    channels, height, width = input_size(name, model)
    size = (height, width)
    device = next(model.parameters()).device.type
    probe = Probe(build, channels, device)
    cost = Cost(parameters_of(model), math.inf)
    if cost.parameters > limits.parameters or overhead_of(model) > limits.work:
        # Too large whatever its multiply-adds are.
        return probe, Plan(size, cost), model
    try:
        cost = cost_of(model, channels, size, device)
    except (NotImplementedError, RuntimeError):
        if device == "cpu":
            raise
        probe = Probe(build, channels, "cpu")
        cost = cost_of(build(), channels, size, "cpu")
    return probe, Plan(size, cost), model


def _arguments(probe: Probe, outer: nn.Module) -> dict[type, Arguments]:
    """Of the model's class and, where a library adapts another network, of that one's too."""
    parts: list[tuple[type, Callable[[nn.Module], nn.Module]]] = [(type(outer), lambda m: m)]
    if trunk_of(outer) is not outer:
        parts.append((type(trunk_of(outer)), trunk_of))
    return {cls: record_arguments(lambda: probe.model({}), part, cls) for cls, part in parts}


def _reduction(model: nn.Module) -> int:
    """Pixels a side of a patch, as far as the model tells."""
    trunk: Any = trunk_of(model)
    try:
        return max(int(info["reduction"]) for info in trunk.feature_info)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    size = getattr(trunk, "patch_size", DEFAULT_REDUCTION)
    return max(size) if isinstance(size, list | tuple) else int(size)
