"""Coalitions: which patches are present."""

from shapwrap.coalitions.checks import are_complement_pairs, check_coalitions
from shapwrap.coalitions.exact import all_coalitions, exact_shapley_values, kernel_regression
from shapwrap.coalitions.sampling import Distribution, sample_coalitions, size_probabilities

__all__ = [
    "Distribution",
    "all_coalitions",
    "are_complement_pairs",
    "check_coalitions",
    "exact_shapley_values",
    "kernel_regression",
    "sample_coalitions",
    "size_probabilities",
]
