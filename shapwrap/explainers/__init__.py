"""Explainers: what one would use instead, each with one interface."""

from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.kernel_shap import KernelSHAP
from shapwrap.explainers.occlusion import Occlusion
from shapwrap.explainers.random_map import RandomMap
from shapwrap.explainers.rise import RISE
from shapwrap.explainers.self_explaining import SelfExplaining

__all__ = [
    "RISE",
    "Attribution",
    "ExplainedModel",
    "Explainer",
    "KernelSHAP",
    "Occlusion",
    "RandomMap",
    "SelfExplaining",
]
