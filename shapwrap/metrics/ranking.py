"""In which order pixels or patches are taken away."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid
from shapwrap.errors import ArgumentError, MapError
from shapwrap.masking.pixels import Size, sums_over_patches
from shapwrap.masking.pooling import compute_dtype
from shapwrap.metrics.maps import is_constant


class ConstantMapWarning(UserWarning):
    """Maps with one value everywhere rank nothing."""


@dataclass(frozen=True)
class Ranking:
    """Cells (pixels or patches) of each image, most relevant first."""

    ranks: Int[Tensor, "batch cells"]
    """Place of each cell, 0 for the most relevant; of equals the first row by row comes first."""
    salience: Float[Tensor, "batch cells"]
    """Value of the cells in that order."""
    constant: Bool[Tensor, " batch"]
    """Maps with one value everywhere, up to the rounding of a resize; ranked row by row."""
    cell_of_pixel: Int[Tensor, " pixels"] | None
    """The patch that each pixel belongs to, row by row; None where the cells are pixels."""
    unit: str
    """What a cell is, in words."""

    def of_pixels(self) -> Int[Tensor, "batch pixels"]:
        """Place of the cell of each pixel, row by row."""
        return self.ranks if self.cell_of_pixel is None else self.ranks[:, self.cell_of_pixel]

    @property
    def num_cells(self) -> int:
        """N."""
        return self.ranks.shape[1]


def check_maps(
    maps: object, images: Tensor, num: int | None = None, each: str = "one map an image"
) -> Tensor:
    """The maps in full precision, without gradient.

    Args:
        maps: What came.
        images: What they are drawn over.
        num: How many maps there must be; one an image if None.
        each: What there is one map of, in words.

    Raises:
        MapError: Not a finite float tensor [num, h, w] on the device of the images.
    """
    num = len(images) if num is None else num
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        came = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise MapError(f"maps are {came}; expected a float tensor [B, h, w], {each}.")
    if maps.ndim != 3 or len(maps) != num or 0 in maps.shape:
        raise MapError(
            f"maps have shape {tuple(maps.shape)}; expected [{num}, h, w], {each}. Patch "
            "values [B, N] become maps with values.unflatten(1, grid)."
        )
    if maps.device != images.device:
        raise MapError(
            f"maps lie on {maps.device}, images on {images.device}; use maps.to(images.device)."
        )
    if maps.shape[-2] > images.shape[-2] or maps.shape[-1] > images.shape[-1]:
        raise MapError(
            f"maps have {maps.shape[-2]} x {maps.shape[-1]} values for images of "
            f"{images.shape[-2]} x {images.shape[-1]} pixels; expected at most one a pixel."
        )
    finite = torch.isfinite(maps).flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise MapError(
            f"maps {bad} contain NaN or infinity, which have no rank; expected finite values. "
            "Look at the method that made them."
        )
    return maps.detach().to(compute_dtype(maps))


def rank_pixels(maps: Float[Tensor, "batch rows columns"], size: Size) -> Ranking:
    """Pixels as cells; a patch map is drawn bilinearly between the centres of its patches."""
    constant = is_constant(maps)
    unit = "pixels"
    if tuple(maps.shape[-2:]) != size:
        unit += f", {maps.shape[-2]} x {maps.shape[-1]} maps upsampled bilinearly"
        drawn = functional.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
    else:
        drawn = maps
    # Interpolation may round one value to several, whose order would mean nothing.
    maps = torch.where(constant[:, None, None], maps[:, :1, :1], drawn)
    return _rank(maps.flatten(1), constant, None, unit)


def rank_patches(
    maps: Float[Tensor, "batch rows columns"],
    size: Size,
    grid: Grid | None,
    covered: Size | None = None,
) -> Ranking:
    """Patches as cells: pixel (r, c) belongs to patch (floor(r h / H), floor(c w / W)).

    Raises:
        ArgumentError: A pixel map without a grid, or a grid that the maps do not have.
    """
    map_size = (maps.shape[-2], maps.shape[-1])
    if grid is None and map_size == size:
        raise ArgumentError(
            f"maps have one value a pixel ({size[0]} x {size[1]}) and grid is None; expected "
            "grid=(rows, columns) to sum them over patches."
        )
    grid = grid or map_size
    if grid[0] > size[0] or grid[1] > size[1]:
        raise ArgumentError(
            f"grid is {grid} for images of {size[0]} x {size[1]} pixels; expected at most one "
            "patch a pixel."
        )
    constant = is_constant(maps)
    if map_size == grid:
        values = maps.flatten(1)
    elif map_size == size:
        values = sums_over_patches(maps, grid, covered)
    else:
        raise ArgumentError(
            f"grid is {grid} and maps have {map_size[0]} x {map_size[1]} values; expected one a "
            f"patch, {grid[0]} x {grid[1]}, or one a pixel, {size[0]} x {size[1]}."
        )
    # Cells of unequal size would rank a constant map by their size.
    values = torch.where(constant[:, None], maps[:, 0, :1], values)
    unit = f"patches, {grid[0]} x {grid[1]}"
    unit += ", values of pixels summed" if map_size != grid else ""
    return _rank(values, constant, patch_of_pixel(grid, size, maps.device), unit)


def patch_of_pixel(grid: Grid, size: Size, device: torch.device) -> Int[Tensor, " pixels"]:
    """Index of the patch of each pixel, row by row."""
    row = torch.arange(size[0], device=device) * grid[0] // size[0]
    column = torch.arange(size[1], device=device) * grid[1] // size[1]
    return rearrange(row[:, None] * grid[1] + column, "height width -> (height width)")


def _rank(
    values: Float[Tensor, "batch cells"],
    constant: Bool[Tensor, " batch"],
    cell_of_pixel: Int[Tensor, " pixels"] | None,
    unit: str,
) -> Ranking:
    salience, order = values.sort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    # Half the memory to read at every step.
    return Ranking(ranks.to(torch.int32), salience, constant, cell_of_pixel, unit)
