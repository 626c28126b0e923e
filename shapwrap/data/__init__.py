"""Data: images with known evidence, masks or texts, image folders, pretrained weights."""

from shapwrap.data.augmentation import Augmentation, timm_transforms
from shapwrap.data.captioned_images import CaptionedImages, captioned_images
from shapwrap.data.digits import ClutteredDigits, DigitScene
from shapwrap.data.hugging_face import HuggingFaceImages, HuggingFaceStream
from shapwrap.data.image_text_shards import ImageTextShards
from shapwrap.data.imagenet_folders import imagenet, imagenette
from shapwrap.data.imagenet_s import ImageNetS
from shapwrap.data.imagenet_segmentation import ImageNetSegmentation
from shapwrap.data.pets import PetSegmentation
from shapwrap.data.pretrained import efficientnet_lite0
from shapwrap.data.segmentation import SegmentationDataset
from shapwrap.data.shard_files import count_samples
from shapwrap.data.skipped import SkippedSampleWarning
from shapwrap.metrics.pointing import Localisation, localisation

__all__ = [
    "Augmentation",
    "CaptionedImages",
    "ClutteredDigits",
    "DigitScene",
    "HuggingFaceImages",
    "HuggingFaceStream",
    "ImageNetS",
    "ImageNetSegmentation",
    "ImageTextShards",
    "Localisation",
    "PetSegmentation",
    "SegmentationDataset",
    "SkippedSampleWarning",
    "captioned_images",
    "count_samples",
    "efficientnet_lite0",
    "imagenet",
    "imagenette",
    "localisation",
    "timm_transforms",
]
