"""Explainers: what one would use instead, each with one interface."""

from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.chefer_lrp import CheferLRP
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.random_map import RandomMap
from shapwrap.explainers.self_explaining import SelfExplaining

__all__ = [
    "Attribution",
    "CheferLRP",
    "ExplainedModel",
    "Explainer",
    "RandomMap",
    "SelfExplaining",
]
