"""Methods made for image-text models."""

from shapwrap.explainers.clip.clip_grad_cam import CLIPGradCAM
from shapwrap.explainers.clip.clip_surgery import CLIPSurgery
from shapwrap.explainers.clip.eclip import ECLIP
from shapwrap.explainers.clip.m2ib import M2IB
from shapwrap.explainers.clip.mask_clip import MaskCLIP

__all__ = ["ECLIP", "M2IB", "CLIPGradCAM", "CLIPSurgery", "MaskCLIP"]
