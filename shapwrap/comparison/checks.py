"""What can be refused before anything is trained: options of metrics and of methods."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shapwrap import metrics
from shapwrap.comparison.config import ComparisonConfig, MethodConfig, MetricConfig
from shapwrap.comparison.datasets import UNTOUCHED, ComparisonData
from shapwrap.comparison.methods import Method
from shapwrap.comparison.schema import check_keys
from shapwrap.errors import ArgumentError, ConfigurationError, ShapwrapError

GIVEN = {
    "faithfulness": {"predict", "images", "maps", "target", "chunk_size", "generator"},
    "insertion_deletion": {"predict", "images", "maps", "target", "chunk_size", "generator"},
    "shapley_truth": {"wrapped", "images", "chunk_size", "generator"},
    "cost": {"explainer", "images", "target"},
}
"""Arguments of a metric that the comparison fills in."""


def check_metric(metric: MetricConfig, data: ComparisonData, config: ComparisonConfig) -> None:
    """Raise on options that a known metric would refuse; one of your own is not asked.

    Raises:
        ConfigurationError: An unknown option or a value outside its range, or a metric that this
            data cannot have.
    """
    where = f"metrics.{metric.name}"
    if metric.metric == "localisation":
        check_keys(metric.options, [], where)
        if not data.masks:
            raise ConfigurationError(
                f"{where} needs masks, and data of kind {config.data.kind!r} has none; expected "
                "data of kind digits, pet, imagenet-s or imagenet-segmentation, or of your own "
                "with masks."
            )
    if metric.metric not in GIVEN:
        return
    functions: dict[str, Callable[..., Any]] = {
        "faithfulness": metrics.faithfulness,
        "insertion_deletion": metrics.insertion_deletion,
        "shapley_truth": metrics.shapley_truth,
        "cost": metrics.cost,
    }
    function = functions[metric.metric]
    names = [n for n in inspect.signature(function).parameters if n not in GIVEN[metric.metric]]
    check_keys(metric.options, names, where)
    if "maps" in GIVEN[metric.metric] and metric.options.get("fill") != "native":
        _try_removal(function, metric, config, where)


def _try_removal(
    function: Callable[..., Any], metric: MetricConfig, config: ComparisonConfig, where: str
) -> None:
    """One image and a model that is a mean: what the values of the options are worth."""
    height, width = config.data.image_size
    side = 14 if metric.options.get("ranking") == "patch" else None
    shape = (side or height, side or width)
    maps = torch.linspace(-1, 1, shape[0] * shape[1]).view(1, *shape)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(
                metrics.predictor(model, UNTOUCHED),
                torch.full((1, 3, height, width), 0.5),
                maps,
                target=torch.zeros(1, dtype=torch.long),
                chunk_size=config.chunk_size,
                generator=torch.Generator().manual_seed(0),
                **metric.options,
            )
    except (ArgumentError, TypeError) as error:
        raise ConfigurationError(f"{where}: {error}") from error
    except Exception:
        # Of the example, not of the options: what fails on real images is recorded in its place.
        return


def check_methods(
    methods: Sequence[MethodConfig], make: Callable[[MethodConfig], Method], where: str
) -> None:
    """Raise on options that a method refuses when it is made for a model.

    Raises:
        ConfigurationError: The method says so.
    """
    for method in methods:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(method)
        except (ArgumentError, ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"methods.{method.name} on {where}: {error}") from error
        except ShapwrapError:
            # It does not apply to this model, which its row will say.
            continue
