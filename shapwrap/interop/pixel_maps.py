"""Patch values as maps of pixels that keep the sum, for packages that attribute to pixels."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid
from shapwrap.errors import BackboneTypeError, GridError
from shapwrap.explanation import Explanation
from shapwrap.wrapper import ShapleyWrapper


def pixel_map(explanation: Explanation) -> Float[Tensor, "batch height width"]:
    """The values of an explanation as maps whose sum over pixels is that of the values.

    Each pixel of a patch gets an equal share of its value, and a pixel that no patch reads gets 0.
    `Explanation.heatmap` is for looking at: it is smooth, and its sum means nothing.

    Raises:
        GridError: A patch has no pixel in the image.
    """
    owner = owner_of_pixel(explanation.grid, explanation.image_size, explanation.covered)
    owner = owner.to(explanation.values.device)
    count = torch.bincount(owner[owner >= 0], minlength=explanation.values.shape[1])
    if (count == 0).any():
        raise GridError(
            f"{int((count == 0).sum())} patches of the grid {explanation.grid} have no pixel in "
            f"images of {explanation.image_size[0]} x {explanation.image_size[1]}, so a map of "
            "pixels would lose their values. Use explanation.values, or larger images."
        )
    # Index -1, nobody's pixel, reads the zero that is put behind the last patch.
    return functional.pad(explanation.values / count, (0, 1))[:, owner]


def owner_of_pixel(
    grid: Grid, size: tuple[int, int], covered: tuple[int, int] | None = None
) -> Int[Tensor, "height width"]:
    """Which patch reads each pixel, row by row over the grid; -1 where none does.

    Drawn as coalitions are, so that the pixels of a patch are those that go when it is absent.

    Args:
        grid: Rows and columns of patches.
        size: Height and width of the image.
        covered: Height and width over which the patches lie, from the upper left corner, where that
            is not the image: less, or more where the model pads it.
    """
    numbers = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, 1, *grid)
    drawn = functional.interpolate(numbers, size=covered or size, mode="nearest")[0, 0].long()
    drawn = drawn[: size[0], : size[1]]
    owner = torch.full(size, -1)
    owner[: drawn.shape[0], : drawn.shape[1]] = drawn
    return owner


def check_wrapped(model: Any) -> ShapleyWrapper:
    """The model, a `ShapleyWrapper`.

    Raises:
        BackboneTypeError: Something else.
    """
    if not isinstance(model, ShapleyWrapper):
        raise BackboneTypeError(
            f"model is {type(model).__name__}; expected a ShapleyWrapper, such as "
            "ShapleyWrapper(model), or clip.classifier(texts) of a ShapleyCLIP."
        )
    return model
