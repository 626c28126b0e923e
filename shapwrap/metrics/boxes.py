"""A map as a box around the object: intersection over union with the true box."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap.errors import ArgumentError
from shapwrap.metrics.components import largest_components
from shapwrap.metrics.maps import above_mean, check_maps, check_masks, scaled

Threshold = Literal["mean"] | float | int
"""What a region is above: the mean of the map, or a fraction of its largest value."""


class BoxLocalisation(NamedTuple):
    """One row an image."""

    iou: Float[Tensor, " batch"]
    """Intersection over union of the two boxes; 0 for a constant map, NaN without an object."""
    found: Int[Tensor, "batch 4"]
    """Box of the map: left, top, right, bottom in pixels, right and bottom excluded; all 0 if
    empty."""
    truth: Int[Tensor, "batch 4"]
    """Box around the object, likewise."""


def box_localisation(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: Threshold | str = "mean",
    largest_component: bool = True,
) -> BoxLocalisation:
    """Boxes around the region where a map is high, and around the object.

    The map is resized bilinear to the mask and min-max scaled to h in [0, 1]; the region is
    h > threshold, strictly. The true box goes around all pixels with label 1.

    Args:
        maps: Float [B, h, w] or [B, H, W]; signed values are taken as they are.
        masks: Int or bool [B, H, W]: 1 object, 0 background, -1 ignored. Draw a given box as a
            rectangle of ones.
        threshold: "mean" for the mean of h, or a fraction of its maximum in [0, 1) (0.2 in the
            reference).
        largest_component: Box around the largest connected region (8 neighbours) alone.

    Raises:
        ArgumentError: Shapes or labels that do not fit, values that are not finite, a threshold
            outside its range.

    References:
        Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", section 3.2.
    """
    is_fraction = isinstance(threshold, int | float) and 0 <= threshold < 1
    if threshold != "mean" and not is_fraction:
        raise ArgumentError(
            f"threshold is {threshold!r}; expected 'mean', or a fraction of the maximum in [0, 1)."
        )
    checked = check_maps(maps)
    labels = check_masks(masks, checked)
    heights, _ = scaled(checked, (labels.shape[-2], labels.shape[-1]))
    region = above_mean(heights) if threshold == "mean" else heights > float(threshold)
    if largest_component:
        region = largest_components(region)
    found, truth = boxes_around(region), boxes_around(labels == 1)
    iou = box_iou(found, truth)
    has_object = (labels == 1).flatten(1).any(dim=1)
    return BoxLocalisation(torch.where(has_object, iou, torch.nan), found, truth)


def boxes_around(regions: Bool[Tensor, "batch height width"]) -> Int[Tensor, "batch 4"]:
    """The smallest boxes: left, top, right, bottom, the last two excluded; 0 where empty."""
    sides = []
    for across in (1, 2):
        occupied = regions.any(dim=across).long()
        length = occupied.shape[1]
        first, behind = occupied.argmax(dim=1), length - occupied.flip(1).argmax(dim=1)
        sides.append((first, torch.where(occupied.any(dim=1), behind, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), dim=1)


def box_iou(
    first: Int[Tensor, "batch 4"], second: Int[Tensor, "batch 4"]
) -> Float[Tensor, " batch"]:
    """Intersection over union of boxes, pair by pair; 0 where both are empty."""
    shared = torch.cat(
        (torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])), 1
    )
    overlap, *areas = (
        (box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1) for box in (shared, first, second)
    )
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1)
