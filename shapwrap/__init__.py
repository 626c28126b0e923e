"""shapwrap: pretrained vision backbones that explain themselves with Shapley values."""

from importlib import import_module
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
    from shapwrap.training.contrastive import ContrastiveTrainer
    from shapwrap.training.contrastive_config import ContrastiveConfig
    from shapwrap.training.trainer import Trainer

__all__ = [
    "Audit",
    "Backbone",
    "ContrastiveConfig",
    "ContrastiveTrainer",
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


_TRAINING = {
    "ContrastiveConfig": "contrastive_config",
    "ContrastiveTrainer": "contrastive",
    "Trainer": "trainer",
    "TrainerConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Trainers and their configurations, loaded on first use: they need the `train` extra."""
    if name in _TRAINING:
        return getattr(import_module(f"shapwrap.training.{_TRAINING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
