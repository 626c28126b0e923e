"""What an explanation costs: parameters, operations, and how many forward passes that is."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.flops import count_operations

MethodCall = Callable[..., Any]
"""Images and a target in, an explanation out: `explainer(images, target)`."""


class Cost(NamedTuple):
    """Of one method on one model, at one image size."""

    parameters: int | None
    """Of the model; None for a function, which does not tell."""
    explainer_parameters: int
    """Of further networks that the method brings, such as a surrogate or a trained explainer."""
    forward_multiply_adds: int
    """Of one plain forward pass, an image. Twice that is FLOPs."""
    explanation_multiply_adds: int
    """Of one explanation, an image: all forward and backward passes that it takes, the one for
    the logits included."""
    forward_equivalents: float
    """`explanation_multiply_adds` / `forward_multiply_adds`; NaN where the latter is 0."""
    seconds_ratio: float | None
    """Time of an explanation / time of a plain forward pass, medians of one run; None if not
    measured."""
    forward_seconds: float | None
    """Median time of a plain forward pass, an image of the batch."""
    explanation_seconds: float | None
    """Median time of an explanation, an image of the batch."""


def cost(
    explainer: MethodCall,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    repeats: int = 0,
) -> Cost:
    """Parameters, operations and forward-equivalents of an explanation.

    Operations are multiply-adds of matrix products, convolutions and attention, the unit of the
    paper's Table 1 (one multiply-add is two FLOPs). The explainer runs once before the count, so
    that what it finds out about a model on first use is not counted; its generator, if it has one,
    moves on.

    Args:
        explainer: Callable on images and target, with the explained model as `.model`: an
            `Explainer`, `SelfExplaining`, or one of your own.
        images: Float [B, C, H, W], normalised; a few are enough.
        target: As the explainer takes it.
        repeats: Timed runs of the forward pass and of the explanation, in turn; none by default.

    Raises:
        ArgumentError: The explainer has no model, or a negative number of repeats.
    """
    check_at_least("repeats", repeats, 0)
    model = explained_model(explainer)
    module = model.module

    def forward() -> None:
        with model.evaluated(), torch.no_grad():
            model.logits(images)

    def explanation() -> None:
        explainer(images, target)

    explanation()
    batch = len(images)
    one, whole = count_operations(forward) / batch, count_operations(explanation) / batch
    own = {} if module is None else {id(p): p.numel() for p in module.parameters()}
    further = {id(p): p.numel() for p in _parameters_of(explainer) if id(p) not in own}
    times = _medians((forward, explanation), repeats, images.device) if repeats else None
    return Cost(
        parameters=None if module is None else sum(own.values()),
        explainer_parameters=sum(further.values()),
        forward_multiply_adds=round(one),
        explanation_multiply_adds=round(whole),
        forward_equivalents=whole / one if one else float("nan"),
        seconds_ratio=None if times is None else times[1] / times[0],
        forward_seconds=None if times is None else times[0] / batch,
        explanation_seconds=None if times is None else times[1] / batch,
    )


def explained_model(explainer: MethodCall) -> ExplainedModel:
    """What the explainer explains.

    Raises:
        ArgumentError: It does not tell.
    """
    model: Any = getattr(explainer, "model", None)
    if isinstance(model, ExplainedModel):
        return model
    if not isinstance(model, nn.Module) and (not callable(model) or isinstance(model, type)):
        raise ArgumentError(
            f"explainer is {type(explainer).__name__} with the model {model!r}; expected the "
            "explained model as explainer.model, an nn.Module or a function from images to logits."
        )
    return ExplainedModel(cast(Model, model))


def _parameters_of(explainer: MethodCall) -> list[nn.Parameter]:
    if isinstance(explainer, nn.Module):
        return list(explainer.parameters())
    parts = getattr(explainer, "__dict__", {}).values()
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]


def _medians(
    calls: tuple[Callable[[], None], ...], repeats: int, device: torch.device
) -> list[float]:
    """Median seconds of each call; they take turns, so that a slow moment hits them alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, taken, strict=True):
            _wait_for(device)
            started = time.perf_counter()
            call()
            _wait_for(device)
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
