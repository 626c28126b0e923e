"""Comparison: models x methods x metrics on a data set, in one call."""

from shapwrap.comparison.comparing import compare
from shapwrap.comparison.config import (
    ComparisonConfig,
    DataConfig,
    FigureConfig,
    MethodConfig,
    MetricConfig,
    ModelConfig,
    parse_config,
    read_config,
)
from shapwrap.comparison.datasets import ComparisonData, Sample
from shapwrap.comparison.measures import Batch, Subject
from shapwrap.comparison.results import Comparison, MethodRow, ModelRow, Outcome
from shapwrap.comparison.summary import Measured

__all__ = [
    "Batch",
    "Comparison",
    "ComparisonConfig",
    "ComparisonData",
    "DataConfig",
    "FigureConfig",
    "Measured",
    "MethodConfig",
    "MethodRow",
    "MetricConfig",
    "ModelConfig",
    "ModelRow",
    "Outcome",
    "Sample",
    "Subject",
    "compare",
    "parse_config",
    "read_config",
]
