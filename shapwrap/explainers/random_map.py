"""Random values: what every faithful method must beat."""

import torch
from jaxtyping import Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model


class RandomMap(Explainer):
    """Independent normal values, one a patch.

    Args:
        model: Read for its patch grid alone.
        grid: Rows and columns of patches; by default those of the backbone.
        generator: Source of randomness, on the CPU; a new one with seed 0 if None.
    """

    name = "random"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, grid=grid)
        self._generator = generator or torch.Generator().manual_seed(0)

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """New values at each call."""
        grid = self.model.grid_of(images)
        values = torch.randn(len(images), grid[0] * grid[1], generator=self._generator)
        return Attribution(values.to(images.device), grid)
