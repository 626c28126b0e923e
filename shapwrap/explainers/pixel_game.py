"""The game that any model plays when the pixels of absent patches are filled."""

import torch
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.coalitions.checks import check_coalitions
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.removal import Fill, replacement, scores_of_masked
from shapwrap.masking.pixels import pixel_mask


class PixelGames:
    """Score of one class of each image, as a function of the patches that are present.

    Args:
        model: In eval mode while it is played.
        images: Normalised.
        target: One class an image.
        grid: Rows and columns of patches, the players.
        fill: What stands in for the pixels of absent patches.
        score: "logit" or "probability".
        chunk_size: Masked images that run at a time.

    Raises:
        ArgumentError: A fill that does not fit the images.
    """

    def __init__(
        self,
        model: ExplainedModel,
        images: Images,
        target: Tensor,
        grid: Grid,
        *,
        fill: Fill | str = "zero",
        score: str = "logit",
        chunk_size: int = 64,
    ):
        self._model = model
        self._images = images
        self._target = target
        self._grid = grid
        self._filling = replacement(images, fill, model.normalization)
        self._score = score
        self._chunk_size = chunk_size
        self._covered = model.covered(images)

    @torch.no_grad()
    def __call__(self, coalitions: Tensor) -> Tensor:
        """Scores [B, S] of coalitions, bool [B, S, N].

        Raises:
            CoalitionTypeError: Not boolean.
            CoalitionError: Another shape.
        """
        grid = self._grid
        check_coalitions(coalitions, len(self._images), grid[0] * grid[1])
        coalitions = coalitions.to(self._images.device)
        size = (self._images.shape[-2], self._images.shape[-1])
        return scores_of_masked(
            self._model,
            self._images,
            self._target,
            coalitions.shape[1],
            lambda row, s: pixel_mask(coalitions[row, s][None], grid, size, self._covered),
            self._filling,
            score=self._score,
            chunk_size=self._chunk_size,
        )

    def select(self, rows: Tensor) -> "PixelGames":
        """The games of some of the images, int64 [b]."""
        rows = rows.to(self._images.device)
        return PixelGames(
            self._model,
            self._images[rows],
            self._target[rows],
            self._grid,
            fill=self._filling[rows],
            score=self._score,
            chunk_size=self._chunk_size,
        )
