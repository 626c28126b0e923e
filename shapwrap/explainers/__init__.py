"""Explainers: what one would use instead, each with one interface."""

from shapwrap.explainers.attcat import AttCAT
from shapwrap.explainers.attention_grad_cam import AttentionGradCAM
from shapwrap.explainers.attention_rollout import AttentionRollout
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.bcosified.bcosified_clip import BcosifiedCLIP
from shapwrap.explainers.bcosified.config import BcosifiedConfig
from shapwrap.explainers.bcosified.tower import BcosifiedTower, bcosify
from shapwrap.explainers.chefer_lrp import CheferLRP
from shapwrap.explainers.clip import ECLIP, M2IB, CLIPGradCAM, CLIPSurgery, MaskCLIP
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.game import GAME
from shapwrap.explainers.grad_cam import GradCAM
from shapwrap.explainers.idgi import IDGI
from shapwrap.explainers.input_x_gradient import InputXGradient
from shapwrap.explainers.integrated_gradients import IntegratedGradients
from shapwrap.explainers.kernel_shap import KernelSHAP
from shapwrap.explainers.occlusion import Occlusion
from shapwrap.explainers.random_map import RandomMap
from shapwrap.explainers.rise import RISE
from shapwrap.explainers.self_explaining import SelfExplaining
from shapwrap.explainers.token_tm import TokenTM, UnverifiedFormulaWarning
from shapwrap.explainers.trained.config import FastSHAPConfig, ViTShapleyConfig
from shapwrap.explainers.trained.fastshap import FastSHAP
from shapwrap.explainers.trained.vit_shapley import ViTShapley

__all__ = [
    "ECLIP",
    "GAME",
    "IDGI",
    "M2IB",
    "RISE",
    "AttCAT",
    "AttentionGradCAM",
    "AttentionRollout",
    "Attribution",
    "BcosifiedCLIP",
    "BcosifiedConfig",
    "BcosifiedTower",
    "CLIPGradCAM",
    "CLIPSurgery",
    "CheferLRP",
    "ExplainedModel",
    "Explainer",
    "FastSHAP",
    "FastSHAPConfig",
    "GradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "KernelSHAP",
    "MaskCLIP",
    "Occlusion",
    "RandomMap",
    "SelfExplaining",
    "TokenTM",
    "UnverifiedFormulaWarning",
    "ViTShapley",
    "ViTShapleyConfig",
    "bcosify",
]
