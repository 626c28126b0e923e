"""Estimators: Shapley values of any game from the values of some of its coalitions."""

from shapwrap.estimators.convergence import ConvergenceWarning
from shapwrap.estimators.enumeration import enumerate_coalitions
from shapwrap.estimators.kernel_shap import kernel_shap
from shapwrap.estimators.permutation_sampling import permutation_sampling
from shapwrap.estimators.result import ShapleyEstimate

__all__ = [
    "ConvergenceWarning",
    "ShapleyEstimate",
    "enumerate_coalitions",
    "kernel_shap",
    "permutation_sampling",
]
