"""shapwrap: pretrained vision backbones that explain themselves with Shapley values."""

from typing import TYPE_CHECKING, Any

from shapwrap._version import __version__
from shapwrap.audit import Audit
from shapwrap.backbones.base import Backbone, FeatureMap
from shapwrap.backbones.registry import register_backbone
from shapwrap.clip import ShapleyCLIP
from shapwrap.coalitions import (
    all_coalitions,
    exact_shapley_values,
    kernel_regression,
    sample_coalitions,
)
from shapwrap.errors import ShapwrapError
from shapwrap.explanation import Explanation
from shapwrap.losses import shapley_loss
from shapwrap.report import Report
from shapwrap.values.output import ShapleyOutput
from shapwrap.wrapper import ShapleyWrapper

if TYPE_CHECKING:
    from shapwrap.training.config import TrainerConfig
    from shapwrap.training.trainer import Trainer

__all__ = [
    "Audit",
    "Backbone",
    "Explanation",
    "FeatureMap",
    "Report",
    "ShapleyCLIP",
    "ShapleyOutput",
    "ShapleyWrapper",
    "ShapwrapError",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "all_coalitions",
    "exact_shapley_values",
    "kernel_regression",
    "register_backbone",
    "sample_coalitions",
    "shapley_loss",
]


def __getattr__(name: str) -> Any:
    """Trainer and its configuration, loaded on first use: they need the `train` extra."""
    if name == "Trainer":
        from shapwrap.training.trainer import Trainer

        return Trainer
    if name == "TrainerConfig":
        from shapwrap.training.config import TrainerConfig

        return TrainerConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
