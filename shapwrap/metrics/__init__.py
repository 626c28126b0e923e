"""Metrics: how far explanations can be trusted, for any model and any map."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shapwrap.metrics.average_precision import average_precision
from shapwrap.metrics.boxes import BoxLocalisation, box_localisation
from shapwrap.metrics.cost import Cost, cost
from shapwrap.metrics.faithfulness_of_maps import faithfulness
from shapwrap.metrics.insertion_deletion_curves import insertion_deletion
from shapwrap.metrics.pointing import Localisation, localisation, pointing_game
from shapwrap.metrics.predictor import Predictor, predictor
from shapwrap.metrics.protocol import ItemScores, Protocol, Scores
from shapwrap.metrics.randomisation import Randomisation, randomisation
from shapwrap.metrics.ranking import ConstantMapWarning
from shapwrap.metrics.retrieval_curves import RetrievalCurves, retrieval_insertion_deletion
from shapwrap.metrics.retrieval_recall import RetrievalScores, retrieval
from shapwrap.metrics.segmentation import (
    SegmentationScores,
    SegmentationStatistics,
    SegmentationTotals,
    segmentation_scores,
    segmentation_statistics,
)
from shapwrap.metrics.sensitivity import Sensitivity, sensitivity_n
from shapwrap.metrics.shapley_error import (
    ClassErrors,
    ShapleyError,
    estimation_error,
    shapley_error,
)
from shapwrap.metrics.shapley_truth import ShapleyTruth, shapley_truth, truth_of
from shapwrap.metrics.stability import Stability, stability
from shapwrap.metrics.value_functions import filled_value, native_value
from shapwrap.metrics.zero_shot_accuracy import zero_shot

if TYPE_CHECKING:
    from shapwrap.metrics.collected import Faithfulness, InsertionDeletion
    from shapwrap.metrics.collected_retrieval import Retrieval, RetrievalInsertionDeletion
    from shapwrap.metrics.localisation_metrics import BoxIoU, PointingGame, Segmentation

# Classes that need torchmetrics, imported when they are asked for.
_LAZY = {
    "Faithfulness": "shapwrap.metrics.collected",
    "InsertionDeletion": "shapwrap.metrics.collected",
    "Retrieval": "shapwrap.metrics.collected_retrieval",
    "RetrievalInsertionDeletion": "shapwrap.metrics.collected_retrieval",
    "BoxIoU": "shapwrap.metrics.localisation_metrics",
    "PointingGame": "shapwrap.metrics.localisation_metrics",
    "Segmentation": "shapwrap.metrics.localisation_metrics",
}

__all__ = [
    "BoxIoU",
    "BoxLocalisation",
    "ClassErrors",
    "ConstantMapWarning",
    "Cost",
    "Faithfulness",
    "InsertionDeletion",
    "ItemScores",
    "Localisation",
    "PointingGame",
    "Predictor",
    "Protocol",
    "Randomisation",
    "Retrieval",
    "RetrievalCurves",
    "RetrievalInsertionDeletion",
    "RetrievalScores",
    "Scores",
    "Segmentation",
    "SegmentationScores",
    "SegmentationStatistics",
    "SegmentationTotals",
    "Sensitivity",
    "ShapleyError",
    "ShapleyTruth",
    "Stability",
    "average_precision",
    "box_localisation",
    "cost",
    "estimation_error",
    "faithfulness",
    "filled_value",
    "insertion_deletion",
    "localisation",
    "native_value",
    "pointing_game",
    "predictor",
    "randomisation",
    "retrieval",
    "retrieval_insertion_deletion",
    "segmentation_scores",
    "segmentation_statistics",
    "sensitivity_n",
    "shapley_error",
    "shapley_truth",
    "stability",
    "truth_of",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """A class that needs torchmetrics."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
