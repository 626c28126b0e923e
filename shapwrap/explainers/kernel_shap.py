"""KernelSHAP: Shapley values of any model, estimated from many masked copies of the image."""

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.errors import ArgumentError
from shapwrap.estimators import enumerate_coalitions, kernel_shap
from shapwrap.estimators.games import Value
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.drawing import Draws
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.pixel_game import PixelGames
from shapwrap.explainers.removal import Fill, check_fill, check_score
from shapwrap.values.patch_game import PatchGames

Masking = Literal["pixels", "native"]


class KernelSHAP(Explainer):
    """Shapley values of the patches, by KernelSHAP on sampled coalitions.

    The values sum to the score of the image minus the score with every patch absent, exactly. All
    images get the same coalitions, and so does every call. Where all 2^N coalitions are no more
    than `num_coalitions`, they are enumerated and the values are exact.

    Args:
        model: As in `Explainer`; any function will do, except for native masking.
        grid: Rows and columns of patches, the players; by default those of the backbone.
        num_coalitions: Coalitions an image; by default 2 N + 2048, an even number.
        threshold: Stop an image earlier, once its largest standard error over the range of its
            values is below this; None to use all coalitions.
        paired: Draw each coalition with its complement.
        exact_matrix: Use the expectation of the regression's matrix: unbiased, larger variance.
        masking: "pixels": those of absent patches are filled. "native": a wrapped model removes
            absent patches in its own way, and the score is v(s).
        fill: What stands in for absent pixels; see `shapwrap.explainers.removal`.
        score: "logit" or "probability" (softmax) of the target class; "native" is in logits.
        batch_size: Coalitions an image between two looks at the running sums.
        generator: One number is drawn from it here, which seeds every call; seed 0 if None.
        chunk_size: Masked images that run at a time.

    Raises:
        ArgumentError: An option out of range, or native masking with a model that is not wrapped,
            another grid than its own, a fill or probabilities.

    References:
        Lundberg & Lee 2017; Covert & Lee 2021.
    """

    name = "kernelshap"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        num_coalitions: int | None = None,
        threshold: float | None = None,
        paired: bool = True,
        exact_matrix: bool = False,
        masking: Masking | str = "pixels",
        fill: Fill | str = "zero",
        score: str = "logit",
        batch_size: int = 256,
        generator: torch.Generator | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_fill(fill)
        check_score(score)
        if masking not in get_args(Masking):
            raise ArgumentError(f"masking is {masking!r}; expected one of {get_args(Masking)}.")
        if num_coalitions is not None and num_coalitions < 2:
            raise ArgumentError(f"num_coalitions is {num_coalitions}; expected at least 2.")
        if masking == "native":
            _check_native(self, grid, fill, score)
        self.num_coalitions = num_coalitions
        self.threshold = threshold
        self.paired = paired
        self.exact_matrix = exact_matrix
        self.masking = masking
        self.fill = fill
        self.score = score
        self.batch_size = batch_size
        self._draws = Draws(generator)

    @torch.no_grad()
    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Shapley values of the score.

        Raises:
            EstimationError: Too few coalitions for the number of patches.
            ArgumentError: A fill that does not fit the images.

        Warns:
            ConvergenceWarning: A threshold was given and not reached.
        """
        grid = self.model.grid_of(images)
        number = grid[0] * grid[1]
        budget = self.num_coalitions or 2 * number + 2048
        game = self._game(images, target, grid)
        if number <= 16 and 2**number <= budget:
            made = enumerate_coalitions(game, len(images), number)
        else:
            made = kernel_shap(
                game,
                len(images),
                number,
                threshold=self.threshold,
                paired=self.paired,
                exact_matrix=self.exact_matrix,
                max_coalitions=budget,
                batch_size=self.batch_size,
                generator=self._draws.again(),
            )
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        total = made.grand - made.empty
        return Attribution(made.values.to(dtype), grid, total=total.to(dtype))

    def _game(self, images: Images, target: Tensor, grid: Grid) -> Value:
        wrapped = self.model.wrapped
        if self.masking == "native" and wrapped is not None:
            return TargetGames(PatchGames(wrapped, images, grid, None, self.chunk_size), target)
        return PixelGames(
            self.model,
            images,
            target,
            grid,
            fill=self.fill,
            score=self.score,
            chunk_size=self.chunk_size,
        )


class TargetGames:
    """The games of one class of each image, out of those of all classes."""

    def __init__(self, games: PatchGames, target: Tensor):
        self._games = games
        self._target = target

    def __call__(self, coalitions: Tensor) -> Tensor:
        """Values [B, S]."""
        values = self._games(coalitions)
        index = self._target[:, None, None].expand(-1, values.shape[1], 1)
        return values.gather(2, index)[..., 0]

    def select(self, rows: Tensor) -> "TargetGames":
        """The games of some of the images."""
        return TargetGames(self._games.select(rows), self._target[rows.to(self._target.device)])


def _check_native(method: KernelSHAP, grid: Grid | None, fill: object, score: str) -> None:
    wrapped = method.model.wrapped
    if wrapped is None:
        raise ArgumentError(
            'masking="native" needs a wrapped model, whose absent patches are removed; pass '
            'ShapleyWrapper(model), or masking="pixels".'
        )
    if grid is not None and tuple(grid) != tuple(wrapped.grid):
        raise ArgumentError(
            f"grid is {grid} with native masking; expected None or the model's own, {wrapped.grid}."
        )
    if not (isinstance(fill, str) and fill == "zero") or score != "logit":
        raise ArgumentError(
            "fill and score are for pixels; native masking fills none and gives logits."
        )
