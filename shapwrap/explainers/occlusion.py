"""Occlusion: how far the score drops when a part of the image is hidden."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.errors import ArgumentError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.removal import (
    Fill,
    check_fill,
    check_score,
    replacement,
    scores,
    scores_of_masked,
)
from shapwrap.masking.pixels import pixel_mask


class Occlusion(Explainer):
    """Score of the image minus the score without one patch, or without what a window covers.

    Without a window, the value of patch n is f(x) - f(x without n). With one, it slides over the
    image; each pixel gets the mean drop of the windows that cover it, divided by the pixels of a
    window, so that a window the size of a patch and moved by patches gives the same values.

    Args:
        model: As in `Explainer`; any function will do.
        grid: Rows and columns of patches; by default those of the backbone.
        window: Height and width in pixels; None for patches.
        stride: Steps of the window, down and across; by default half of it, at least 1.
        fill: What stands in for hidden pixels; see `shapwrap.explainers.removal`.
        score: "logit" or "probability" (softmax) of the target class.
        chunk_size: Masked images that run at a time.

    Raises:
        ArgumentError: An unknown fill or score, or a window or stride below 1.

    References:
        Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks".
    """

    name = "occlusion"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        fill: Fill | str = "zero",
        score: str = "logit",
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_fill(fill)
        check_score(score)
        for name, pair in (("window", window), ("stride", stride)):
            if pair is not None and not (
                len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)
            ):
                raise ArgumentError(f"{name} is {pair!r}; expected two positive ints, rows first.")
        if stride is not None and window is None:
            raise ArgumentError("stride is given without a window; pass window=(height, width).")
        self.fill = fill
        self.score = score
        self.window = window
        if window is not None and stride is None:
            stride = (max(1, window[0] // 2), max(1, window[1] // 2))
        self.stride = stride

    @torch.no_grad()
    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Drops of patches, or of pixels under a window.

        Raises:
            ArgumentError: A window larger than the images, or a fill that does not fit them.
        """
        filling = replacement(images, self.fill, self.model.normalization)
        whole = torch.cat(
            [
                scores(self.model, part, classes, self.score)
                for part, classes in zip(
                    images.split(self.chunk_size), target.split(self.chunk_size), strict=True
                )
            ]
        )
        if self.window is not None and self.stride is not None:
            return self._with_window(images, target, filling, whole)
        grid = self.model.grid_of(images)
        number = grid[0] * grid[1]
        kept = ~torch.eye(number, dtype=torch.bool, device=images.device)
        size = (images.shape[-2], images.shape[-1])
        covered = self.model.covered(images)
        without = self._scores(
            images,
            target,
            number,
            lambda _, patch: pixel_mask(kept[None, patch], grid, size, covered),
            filling,
        )
        return Attribution(whole[:, None] - without, grid)

    def _with_window(
        self, images: Images, target: Tensor, filling: Images, whole: Tensor
    ) -> Attribution:
        window, stride = self.window or (1, 1), self.stride or (1, 1)
        size = (images.shape[-2], images.shape[-1])
        corners = Corners.over(size, window, stride, images.device)
        pixels = whole.new_zeros(len(images), *size)
        visits = whole.new_zeros(size)
        for part in corners.split(self.chunk_size):
            hidden = part.windows(size, window)
            kept = ~hidden[:, None]
            without = self._scores(
                images, target, len(kept), lambda _, index, kept=kept: kept[index], filling
            )
            drops = whole[:, None] - without
            cover = hidden.to(drops)
            pixels += torch.einsum("bm,mhw->bhw", drops, cover)
            visits += cover.sum(dim=0)
        return self.of_pixels(pixels / visits / (window[0] * window[1]), images)

    def _scores(
        self,
        images: Images,
        target: Tensor,
        number: int,
        masks_of: Callable[[Tensor, Tensor], Tensor],
        filling: Images,
    ) -> Float[Tensor, "batch masks"]:
        return scores_of_masked(
            self.model,
            images,
            target,
            number,
            masks_of,
            filling,
            score=self.score,
            chunk_size=self.chunk_size,
        )


class Corners(NamedTuple):
    """Upper left corners of windows."""

    top: Int[Tensor, " windows"]
    left: Int[Tensor, " windows"]

    @classmethod
    def over(
        cls, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], device: object
    ) -> "Corners":
        """Corners that cover the image; the last row and column lie flush with the border.

        Raises:
            ArgumentError: The window is larger than the image, or steps over pixels.
        """
        if window[0] > size[0] or window[1] > size[1]:
            raise ArgumentError(f"window is {window}; expected one within the images, {size}.")
        if stride[0] > window[0] or stride[1] > window[1]:
            raise ArgumentError(
                f"stride is {stride}, larger than the window {window}; pixels between would never "
                "be hidden. Expected a stride of at most the window."
            )
        axes = []
        for whole, part, step in zip(size, window, stride, strict=True):
            starts = [*range(0, whole - part, step), whole - part]
            axes.append(torch.tensor(starts, device=device))  # pyright: ignore[reportArgumentType]
        top, left = torch.meshgrid(*axes, indexing="ij")
        return cls(top.flatten(), left.flatten())

    def split(self, number: int) -> "list[Corners]":
        """At most `number` at a time."""
        pairs = zip(self.top.split(number), self.left.split(number), strict=True)
        return [Corners(top, left) for top, left in pairs]

    def windows(
        self, size: tuple[int, int], window: tuple[int, int]
    ) -> Bool[Tensor, "windows height width"]:
        """True inside each window."""
        row = torch.arange(size[0], device=self.top.device) - self.top[:, None]
        column = torch.arange(size[1], device=self.top.device) - self.left[:, None]
        rows = (row >= 0) & (row < window[0])
        columns = (column >= 0) & (column < window[1])
        return rows[:, :, None] & columns[:, None, :]
