"""Explainers: what one would use instead, each with one interface."""

from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.random_map import RandomMap
from shapwrap.explainers.self_explaining import SelfExplaining
from shapwrap.explainers.trained.config import FastSHAPConfig, ViTShapleyConfig
from shapwrap.explainers.trained.fastshap import FastSHAP
from shapwrap.explainers.trained.vit_shapley import ViTShapley

__all__ = [
    "Attribution",
    "ExplainedModel",
    "Explainer",
    "FastSHAP",
    "FastSHAPConfig",
    "RandomMap",
    "SelfExplaining",
    "ViTShapley",
    "ViTShapleyConfig",
]
