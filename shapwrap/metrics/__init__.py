"""Metrics: how far explanations can be trusted, for any model and any map."""

from typing import TYPE_CHECKING, Any

from shapwrap.metrics.faithfulness_of_maps import faithfulness
from shapwrap.metrics.insertion_deletion_curves import insertion_deletion
from shapwrap.metrics.predictor import Predictor, predictor
from shapwrap.metrics.protocol import Protocol, Scores
from shapwrap.metrics.ranking import ConstantMapWarning

if TYPE_CHECKING:
    from shapwrap.metrics.collected import Faithfulness, InsertionDeletion

__all__ = [
    "ConstantMapWarning",
    "Faithfulness",
    "InsertionDeletion",
    "Predictor",
    "Protocol",
    "Scores",
    "faithfulness",
    "insertion_deletion",
    "predictor",
]

COLLECTED = ("Faithfulness", "InsertionDeletion")
"""Classes on top of torchmetrics, loaded on first use: they need the `metrics` extra."""


def __getattr__(name: str) -> Any:
    """The classes that collect over batches and processes."""
    if name in COLLECTED:
        from shapwrap.metrics import collected

        return getattr(collected, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
