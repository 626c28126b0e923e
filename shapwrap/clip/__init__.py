"""Models of images and texts that explain their match: CLIP, SigLIP and their kin."""

from shapwrap.clip.output import ContrastiveOutput
from shapwrap.clip.report import ImageTextReport
from shapwrap.clip.shapley_clip import ShapleyCLIP, wrap_image_text
from shapwrap.clip.zero_shot import ZeroShotClassifier

__all__ = [
    "ContrastiveOutput",
    "ImageTextReport",
    "ShapleyCLIP",
    "ZeroShotClassifier",
    "wrap_image_text",
]
