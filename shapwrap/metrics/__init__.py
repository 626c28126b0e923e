"""Metrics: how far explanations can be trusted, for any model and any map."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shapwrap.metrics.average_precision import average_precision
from shapwrap.metrics.boxes import BoxLocalisation, box_localisation
from shapwrap.metrics.pointing import Localisation, localisation, pointing_game
from shapwrap.metrics.segmentation import (
    SegmentationScores,
    SegmentationStatistics,
    SegmentationTotals,
    segmentation_scores,
    segmentation_statistics,
)

if TYPE_CHECKING:
    from shapwrap.metrics.localisation_metrics import BoxIoU, PointingGame, Segmentation

# Classes that need torchmetrics, imported when they are asked for.
_LAZY = {
    "BoxIoU": "shapwrap.metrics.localisation_metrics",
    "PointingGame": "shapwrap.metrics.localisation_metrics",
    "Segmentation": "shapwrap.metrics.localisation_metrics",
}

__all__ = [
    "BoxIoU",
    "BoxLocalisation",
    "Localisation",
    "PointingGame",
    "Segmentation",
    "SegmentationScores",
    "SegmentationStatistics",
    "SegmentationTotals",
    "average_precision",
    "box_localisation",
    "localisation",
    "pointing_game",
    "segmentation_scores",
    "segmentation_statistics",
]


def __getattr__(name: str) -> Any:
    """A class that needs torchmetrics."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
