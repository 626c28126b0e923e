"""Hiding patches by zeroing their pixels, for backbones that cannot drop a patch."""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Coalitions, Grid, Images

Size = tuple[int, int]
"""Height and width in pixels."""


def zero_absent_pixels(
    images: Images, coalitions: Coalitions, grid: Grid, covered: Size | None = None
) -> Float[Tensor, "items channels height width"]:
    """One masked image for each coalition, [B * S, C, H, W], zero where a patch is absent.

    The images are normalised, so zero is the mean colour of the training set. Patch (i, j) of an
    h x w grid covers the pixels whose row r has floor(r h / H) = i, and likewise for columns; a
    size that the grid does not divide gives cells that differ by one pixel.

    References:
        Fan, Yang & Ma 2026, "standard zero-masking for CNN".
    """
    present = pixel_mask(coalitions, grid, (images.shape[-2], images.shape[-1]), covered)
    repeated = repeat(images, "b c h w -> (b s) c h w", s=coalitions.shape[1])
    # A product would keep NaN and infinity of absent pixels; a selection does not.
    return torch.where(present, repeated, repeated.new_zeros(()))


def pixel_mask(
    coalitions: Coalitions, grid: Grid, size: Size, covered: Size | None = None
) -> Bool[Tensor, "items 1 height width"]:
    """Coalitions drawn on the pixels, bool [B * S, 1, H, W].

    Args:
        coalitions: True where a patch is present.
        grid: Rows and columns of patches.
        size: Height and width of the images.
        covered: Height and width over which the patches lie, from the upper left corner, where
            that is not the image: pixels beyond are read by no patch and count as present.
    """
    cells = rearrange(
        coalitions, "b s (rows columns) -> (b s) 1 rows columns", rows=grid[0], columns=grid[1]
    )
    drawn = functional.interpolate(cells.to(torch.float32), size=covered or size, mode="nearest")
    return fitted(drawn, size, fill=1.0) > 0


def sums_over_patches(
    pixels: Float[Tensor, "batch height width"], grid: Grid, covered: Size | None = None
) -> Float[Tensor, "batch patches"]:
    """Sum of a map over the cell of each patch, row by row; cells as in `zero_absent_pixels`.

    Pixels beyond `covered` belong to the nearest patch, so that nothing is lost from the sum.
    """
    (height, width), (rows, columns) = pixels.shape[-2:], grid
    covered = covered or (height, width)
    row = (torch.arange(height, device=pixels.device) * rows // covered[0]).clamp(max=rows - 1)
    column = (torch.arange(width, device=pixels.device) * columns // covered[1]).clamp(
        max=columns - 1
    )
    cell = (row[:, None] * columns + column).flatten()
    sums = pixels.new_zeros(len(pixels), rows * columns)
    return sums.index_add(1, cell, pixels.flatten(1))


def fitted(
    drawn: Float[Tensor, "items channels rows columns"], size: Size, *, fill: float
) -> Float[Tensor, "items channels height width"]:
    """A drawing cut off, or filled up, at its lower and right border to the size of the image."""
    missing = (0, size[1] - drawn.shape[-1], 0, size[0] - drawn.shape[-2])
    return functional.pad(drawn, missing, value=fill) if any(missing) else drawn
