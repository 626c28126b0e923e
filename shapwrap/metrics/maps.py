"""Maps and masks as the localisation metrics take them: checked, at one size, in one range."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap.errors import ArgumentError

IGNORE = -1
"""Label of pixels that take no part."""

ROUNDING = 4
"""A map whose range is below this many units in the last place of its largest magnitude is
constant: resizing a constant map leaves that much."""


def check_maps(maps: object) -> Tensor:
    """The maps in float32 or float64.

    Raises:
        ArgumentError: Not [B, h, w], not floating point, or not finite.
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        came = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise ArgumentError(f"maps are {came}; expected a floating-point tensor [B, h, w].")
    if maps.ndim != 3 or 0 in maps.shape:
        raise ArgumentError(
            f"maps have shape {tuple(maps.shape)}; expected [B, h, w], one map an image, such as "
            "explanation.heatmap()."
        )
    finite = torch.isfinite(maps).flatten(1).all(dim=1)
    if not finite.all():
        raise ArgumentError(
            f"maps {(~finite).nonzero()[:, 0].tolist()} hold NaN or infinity; expected finite "
            "values. Look at the explanation of these images, or leave them out."
        )
    return maps.detach() if maps.dtype == torch.float64 else maps.detach().float()


def check_masks(masks: object, maps: Tensor) -> Int[Tensor, "batch height width"]:
    """The masks as int64 where the maps lie, 1 object, 0 background, -1 ignored.

    Raises:
        ArgumentError: Not one mask a map, or other labels.
    """
    if not isinstance(masks, Tensor) or masks.is_floating_point() or masks.is_complex():
        came = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise ArgumentError(
            f"masks are {came}; expected int or bool [B, H, W]: 1 object, 0 background, "
            f"{IGNORE} ignored."
        )
    if masks.ndim != 3 or len(masks) != len(maps) or 0 in masks.shape:
        raise ArgumentError(
            f"masks have shape {tuple(masks.shape)}; expected [B, H, W], one for each of the "
            f"{len(maps)} maps."
        )
    masks = masks.to(maps.device).long()
    known = (masks >= IGNORE) & (masks <= 1)
    if not known.all():
        raise ArgumentError(
            f"masks hold the label {int(masks[~known][0])}; expected 1 object, 0 background, "
            f"{IGNORE} ignored. Map the classes of the data set to these first."
        )
    return masks


def resized(
    maps: Float[Tensor, "batch rows columns"], size: tuple[int, int]
) -> Float[Tensor, "batch height width"]:
    """The maps at a size in pixels, bilinear between cell centres."""
    if maps.shape[-2:] == size:
        return maps
    drawn = functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
    return drawn[:, 0]


def is_constant(maps: Float[Tensor, "batch rows columns"]) -> Bool[Tensor, " batch"]:
    """Maps that rank nothing: one value everywhere, up to the rounding of a resize."""
    flat = maps.flatten(1)
    rounding = ROUNDING * torch.finfo(maps.dtype).eps * flat.abs().amax(dim=1)
    return flat.amax(dim=1) - flat.amin(dim=1) <= rounding


def scaled(
    maps: Float[Tensor, "batch rows columns"], size: tuple[int, int]
) -> tuple[Float[Tensor, "batch height width"], Bool[Tensor, " batch"]]:
    """Maps resized, then min-max in [0, 1] image by image; and which are constant, hence all 0."""
    drawn = resized(maps, size)
    # A smaller size may also leave one value of several.
    constant = is_constant(maps) | is_constant(drawn)
    low, high = drawn.amin(dim=(1, 2), keepdim=True), drawn.amax(dim=(1, 2), keepdim=True)
    between = (drawn - low) / (high - low)
    return torch.where(constant[:, None, None], 0.0, between), constant


def above_mean(
    heights: Float[Tensor, "batch height width"],
) -> Bool[Tensor, "batch height width"]:
    """Strictly above the mean of the image, in double precision, whatever the batch."""
    exact = heights.double()
    return exact > exact.mean(dim=(1, 2), keepdim=True)
