"""RISE: what the score is, on average, while a pixel is visible."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.drawing import Draws
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.removal import (
    Fill,
    check_fill,
    check_score,
    replacement,
    scores_of_masked,
)


class RISE(Explainer):
    """Randomised input sampling: sum over masks of score times mask, over `num_masks` times p.

    A mask is a coarse grid of cells, each kept with probability p, drawn larger than the image by
    bilinear interpolation and shifted at random. A pixel's value estimates the score given that
    the pixel is visible: positive everywhere for a probability, so only differences mean anything,
    and no sum is claimed. All images get the same masks, and so does every call.

    Args:
        model: As in `Explainer`; any function will do.
        grid: Rows and columns of patches that the pixels are added up to.
        num_masks: Masks an image.
        cells: Rows and columns of the coarse grid.
        keep: p, between 0 and 1.
        fill: What stands in for hidden pixels; see `shapwrap.explainers.removal`.
        score: "probability" (softmax, as published) or "logit" of the target class.
        generator: One number is drawn from it here, which seeds every call; seed 0 if None.
        chunk_size: Masked images that run at a time.

    Raises:
        ArgumentError: An option out of range.

    References:
        Petsiuk, Das & Saenko 2018, "RISE: Randomized Input Sampling for Explanation of Black-box
        Models".
    """

    name = "rise"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        num_masks: int = 4000,
        cells: tuple[int, int] = (7, 7),
        keep: float = 0.5,
        fill: Fill | str = "zero",
        score: str = "probability",
        generator: torch.Generator | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_fill(fill)
        check_score(score)
        check_at_least("num_masks", num_masks, 1)
        if not (len(cells) == 2 and all(isinstance(n, int) and n > 0 for n in cells)):
            raise ArgumentError(f"cells is {cells!r}; expected two positive ints, rows first.")
        if not 0 < keep < 1:
            raise ArgumentError(f"keep is {keep}; expected a probability between 0 and 1.")
        self.num_masks = num_masks
        self.cells = cells
        self.keep = keep
        self.fill = fill
        self.score = score
        self._draws = Draws(generator)

    @torch.no_grad()
    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Mean score with each pixel visible.

        Raises:
            ArgumentError: A fill that does not fit the images.
        """
        filling = replacement(images, self.fill, self.model.normalization)
        size = (images.shape[-2], images.shape[-1])
        generator = self._draws.again()
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        pixels = torch.zeros(len(images), *size, dtype=dtype, device=images.device)
        # Only the coarse masks are drawn and kept for all; drawn large, they would fill memory.
        coarse = CoarseMasks.drawn(self.num_masks, size, self.cells, self.keep, generator)
        for part in coarse.split(self.chunk_size):
            masks = part.masks(size).to(device=images.device, dtype=dtype)
            found = scores_of_masked(
                self.model,
                images,
                target,
                len(masks),
                lambda _, index, masks=masks: masks[index, None],
                filling,
                score=self.score,
                chunk_size=self.chunk_size,
            )
            pixels += torch.einsum("bm,mhw->bhw", found.to(dtype), masks)
        return self.of_pixels(pixels / (self.num_masks * self.keep), images)


class CoarseMasks(NamedTuple):
    """Random masks before they are drawn on pixels, on the CPU."""

    kept: Float[Tensor, "masks 1 rows columns"]
    """1 for a cell that is kept."""
    top: Int[Tensor, "masks 1"]
    """Offset of the image in the drawn grid, in pixels."""
    left: Int[Tensor, "masks 1"]

    @classmethod
    def drawn(
        cls,
        number: int,
        size: tuple[int, int],
        cells: tuple[int, int],
        keep: float,
        generator: torch.Generator,
    ) -> "CoarseMasks":
        """Cells kept with probability `keep`, offsets uniform over one cell."""
        kept = (torch.rand(number, 1, *cells, generator=generator) < keep).float()
        top, left = (
            torch.randint(step, (number, 1), generator=generator) for step in _steps(size, cells)
        )
        return cls(kept, top, left)

    def split(self, number: int) -> "list[CoarseMasks]":
        """At most `number` at a time."""
        parts = zip(*(tensor.split(number) for tensor in self), strict=True)
        return [CoarseMasks(*part) for part in parts]

    def masks(self, size: tuple[int, int]) -> Float[Tensor, "masks height width"]:
        """Smooth masks in [0, 1].

        With cells of ceil(H / rows) x ceil(W / columns) pixels, the coarse grid is drawn one cell
        larger than the image in both directions, and cut out at the offset.
        """
        cells = (self.kept.shape[-2], self.kept.shape[-1])
        large = [(n + 1) * step for n, step in zip(cells, _steps(size, cells), strict=True)]
        drawn = functional.interpolate(self.kept, size=large, mode="bilinear", align_corners=False)
        rows = (self.top + torch.arange(size[0]))[:, :, None]
        columns = (self.left + torch.arange(size[1]))[:, None, :]
        return drawn[torch.arange(len(drawn))[:, None, None], 0, rows, columns].clamp(0, 1)


def _steps(size: tuple[int, int], cells: tuple[int, int]) -> list[int]:
    return [math.ceil(side / parts) for side, parts in zip(size, cells, strict=True)]
