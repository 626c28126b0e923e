"""FastSHAP's explainer: a U-Net that gives one value a class for every cell of the grid."""

import math
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from shapwrap._types import Grid, Images, PatchValues
from shapwrap.errors import GridError

WIDEST = 8
"""Largest number of channels, as a multiple of those at full resolution."""


class UNet(nn.Module):
    """Images to raw patch values [B, N, K].

    The path down ends one level below the grid; the path up ends at the coarsest level that is
    at least as fine as the grid, whose cells are then averaged. At CIFAR's size with 2 x 2 pixels a
    cell, that is two levels down and one up, as published.

    Args:
        channels: Of the images.
        num_classes: K.
        image_size: Height and width of the images.
        grid: Rows and columns of patches.
        width: Channels at full resolution.

    Raises:
        GridError: More cells than pixels.

    References:
        Ronneberger et al. 2015; Jethani et al. 2022.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        grid: Grid,
        *,
        width: int,
    ):
        super().__init__()
        pixels = min(image_size[0] / grid[0], image_size[1] / grid[1])
        if pixels < 1:
            raise GridError(
                f"grid is {grid} for images of {image_size[0]} x {image_size[1]} pixels; expected "
                "cells of at least one pixel."
            )
        # The lowest map keeps 2 x 2 pixels, so that batch statistics exist for one image too.
        deepest = max(0, math.floor(math.log2(min(image_size))) - 1)
        level = min(math.floor(math.log2(pixels)), deepest)
        widths = [width * min(2**depth, WIDEST) for depth in range(min(level + 1, deepest) + 1)]
        self.stem = _convolutions(channels, widths[0])
        self.down = nn.ModuleList(_convolutions(above, below) for above, below in pairwise(widths))
        self.up = nn.ModuleList(
            _convolutions(widths[depth + 1] + widths[depth], widths[depth])
            for depth in reversed(range(level, len(widths) - 1))
        )
        self.head = nn.Conv2d(widths[level], num_classes, 1)
        self._grid = grid

    def forward(self, images: Images) -> PatchValues:
        """Raw values, before normalisation."""
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(functional.max_pool2d(maps[-1], 2)))
        found = maps.pop()
        for layer in self.up:
            skipped = maps.pop()
            found = functional.interpolate(
                found, size=skipped.shape[-2:], mode="bilinear", align_corners=False
            )
            found = layer(torch.cat((found, skipped), dim=1))
        cells = functional.adaptive_avg_pool2d(found, self._grid)
        return rearrange(self.head(cells), "b k rows columns -> b (rows columns) k")


def _convolutions(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
