"""A map as a segmentation of the object: pixel accuracy, mIoU and mAP in Chefer's protocol."""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.metrics.average_precision import average_precision
from shapwrap.metrics.maps import IGNORE, above_mean, check_maps, check_masks, scaled

PROTOCOL = (
    "map bilinear to the mask's size, signed values kept, min-max per image; object = above the "
    f"image's mean; label {IGNORE} ignored; pixel accuracy and IoU from counts summed over the "
    "data set, mIoU = mean of background and object; AP per image over concat(1 - h, h), mean over "
    "images; F1 of the object per image, mean over images; constant map = all background, all "
    "scores tied"
)


class SegmentationScores(NamedTuple):
    """Result over a data set."""

    pixel_accuracy: float
    """Correct pixels of all images / labelled pixels of all images."""
    mean_iou: float
    """Mean over background and object of summed intersection / summed union."""
    mean_average_precision: float
    """Mean over images of one micro-averaged AP."""
    mean_f1: float
    """Mean over images of the F1 of the object."""
    images: int
    """Images with at least one labelled pixel; the others count nowhere."""
    constant: int
    """Maps among them that rank nothing: all background."""
    unlabelled: int
    """Images without any labelled pixel."""
    protocol: str = PROTOCOL
    """How the numbers were made."""


class SegmentationTotals(NamedTuple):
    """What is added up over a data set, and over processes."""

    correct: Int[Tensor, ""]
    labelled: Int[Tensor, ""]
    intersection: Int[Tensor, "2"]
    union: Int[Tensor, "2"]
    average_precision: Float[Tensor, ""]
    f1: Float[Tensor, ""]
    images: Int[Tensor, ""]
    constant: Int[Tensor, ""]
    unlabelled: Int[Tensor, ""]

    def scores(self) -> SegmentationScores:
        """The result; warns of constant maps and of images without labels.

        Raises:
            ArgumentError: No pixel is labelled in any image.
        """
        images, constant = int(self.images), int(self.constant)
        if images == 0:
            raise ArgumentError(
                "no image has a labelled pixel; expected masks that hold 0 or 1 somewhere. Call "
                "update first, and look at the masks."
            )
        if constant or self.unlabelled:
            warnings.warn(
                f"of {images + int(self.unlabelled)} images, {constant} have a constant map, "
                f"counted as all background, and {int(self.unlabelled)} no labelled pixel, left "
                "out.",
                stacklevel=3,
            )
        iou = self.intersection.double() / self.union.clamp(min=1)
        return SegmentationScores(
            pixel_accuracy=float(self.correct / self.labelled.double()),
            mean_iou=float(iou.mean()),
            mean_average_precision=float(self.average_precision / images),
            mean_f1=float(self.f1 / images),
            images=images,
            constant=constant,
            unlabelled=int(self.unlabelled),
        )


class SegmentationStatistics(NamedTuple):
    """One row an image: all that the result over any set of images needs."""

    correct: Int[Tensor, " batch"]
    """Labelled pixels on the right side of the threshold."""
    labelled: Int[Tensor, " batch"]
    """Pixels that are not ignored."""
    intersection: Int[Tensor, "batch 2"]
    """Pixels of background and of object in both."""
    union: Int[Tensor, "batch 2"]
    """Pixels of background and of object in either."""
    average_precision: Float[Tensor, " batch"]
    """float64; NaN without labelled pixels."""
    f1: Float[Tensor, " batch"]
    """float64, of the object; 0 where there is none in either."""
    constant: Bool[Tensor, " batch"]
    """Maps that rank nothing."""

    def totals(self) -> SegmentationTotals:
        """Sums over the images."""
        known = self.labelled > 0
        return SegmentationTotals(
            correct=self.correct.sum(),
            labelled=self.labelled.sum(),
            intersection=self.intersection.sum(dim=0),
            union=self.union.sum(dim=0),
            average_precision=self.average_precision[known].sum(),
            f1=self.f1[known].sum(),
            images=known.sum(),
            constant=(self.constant & known).sum(),
            unlabelled=(~known).sum(),
        )


def segmentation_statistics(
    maps: Tensor, masks: Tensor, *, chunk_size: int = 32
) -> SegmentationStatistics:
    """Counts and average precision of each image.

    Args:
        maps: Float [B, h, w] or [B, H, W]; signed values are taken as they are.
        masks: Int or bool [B, H, W]: 1 object, 0 background, -1 ignored.
        chunk_size: Images that are sorted at a time.

    Raises:
        ArgumentError: Shapes or labels that do not fit, values that are not finite.

    References:
        Chefer, Gur & Wolf 2021, "Transformer Interpretability Beyond Attention Visualization",
        section 4, "Segmentation".
    """
    check_at_least("chunk_size", chunk_size, 1)
    checked = check_maps(maps)
    labels = check_masks(masks, checked)
    parts = zip(checked.split(chunk_size), labels.split(chunk_size), strict=True)
    columns = zip(*(_statistics(*part) for part in parts), strict=True)
    return SegmentationStatistics(*(torch.cat(column) for column in columns))


def segmentation_scores(maps: Tensor, masks: Tensor, *, chunk_size: int = 32) -> SegmentationScores:
    """Pixel accuracy, mIoU, mAP and mF1 of a data set in one call.

    Args:
        maps: As for `segmentation_statistics`.
        masks: As for `segmentation_statistics`.
        chunk_size: Images that are sorted at a time.

    Raises:
        ArgumentError: As for `segmentation_statistics`, or no pixel is labelled.
    """
    return segmentation_statistics(maps, masks, chunk_size=chunk_size).totals().scores()


def _statistics(
    maps: Float[Tensor, "batch rows columns"], masks: Int[Tensor, "batch height width"]
) -> SegmentationStatistics:
    heights, constant = scaled(maps, (masks.shape[-2], masks.shape[-1]))
    predicted = above_mean(heights).flatten(1)
    labelled, is_object = (masks != IGNORE).flatten(1), (masks == 1).flatten(1)
    found = torch.stack((~predicted, predicted), dim=1) & labelled[:, None]
    truth = torch.stack((~is_object, is_object), dim=1) & labelled[:, None]
    intersection, union = (found & truth).sum(dim=2), (found | truth).sum(dim=2)
    flat = heights.flatten(1)
    # A constant map gives both classes the same score everywhere.
    background = torch.where(constant[:, None], 0.0, 1 - flat)
    precision = average_precision(
        torch.cat((background, flat), dim=1),
        torch.cat((~is_object, is_object), dim=1),
        torch.cat((labelled, labelled), dim=1),
    )
    object_pixels = (found[:, 1].sum(dim=1) + truth[:, 1].sum(dim=1)).clamp(min=1)
    return SegmentationStatistics(
        correct=intersection.sum(dim=1),
        labelled=labelled.sum(dim=1),
        intersection=intersection,
        union=union,
        average_precision=precision,
        f1=2 * intersection[:, 1].double() / object_pixels,
        constant=constant,
    )
