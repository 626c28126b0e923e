"""Metrics: how far explanations can be trusted, for any model and any map."""

from shapwrap.metrics.shapley_error import (
    ClassErrors,
    ShapleyError,
    estimation_error,
    shapley_error,
)
from shapwrap.metrics.shapley_truth import ShapleyTruth, shapley_truth, truth_of

__all__ = [
    "ClassErrors",
    "ShapleyError",
    "ShapleyTruth",
    "estimation_error",
    "shapley_error",
    "shapley_truth",
    "truth_of",
]
