"""Explainers: what one would use instead, each with one interface."""

from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.grad_cam import GradCAM
from shapwrap.explainers.idgi import IDGI
from shapwrap.explainers.input_x_gradient import InputXGradient
from shapwrap.explainers.integrated_gradients import IntegratedGradients
from shapwrap.explainers.random_map import RandomMap
from shapwrap.explainers.self_explaining import SelfExplaining

__all__ = [
    "IDGI",
    "Attribution",
    "ExplainedModel",
    "Explainer",
    "GradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "RandomMap",
    "SelfExplaining",
]
