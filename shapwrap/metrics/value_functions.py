"""Value functions: what a model says of an image of which only some patches are there."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Coalitions, Grid
from shapwrap.arguments import check_at_least
from shapwrap.errors import BackboneTypeError, ImageError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.explainers.pixel_game import PixelGames
from shapwrap.explanation import check_target
from shapwrap.values.patch_game import PatchGames
from shapwrap.wrapper import ShapleyWrapper

ValueFunction = Callable[[Coalitions], Float[Tensor, "batch coalitions"]]
"""From coalitions, bool [B, S, N], True where a patch is present, to values [B, S] of one class."""


def native_value(
    wrapped: Model,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> ValueFunction:
    """v(s) of a wrapped model, in logits: absent patches never reach it.

    Args:
        wrapped: The model; it runs in eval mode.
        images: Float [B, C, H, W], normalised as the model was trained.
        target: Class index, or one an image; the predicted class if None.
        chunk_size: Masked images that run at a time.

    Raises:
        BackboneTypeError: The model is not wrapped.
        ArgumentError: A chunk size below 1.
        ImageError: Images that the model refuses.
        TargetError: A class that the model does not have.
    """
    if not isinstance(wrapped, ShapleyWrapper):
        raise BackboneTypeError(
            f"wrapped is {type(wrapped).__name__}; expected a ShapleyWrapper. For another model "
            "use filled_value."
        )
    model = ExplainedModel(wrapped)
    classes = _classes(model, images, target, chunk_size)
    games = PatchGames(wrapped, images, model.grid_of(images), chunk_size=chunk_size)

    def value(coalitions: Coalitions) -> Float[Tensor, "batch coalitions"]:
        """Values of coalitions of patches."""
        values = games(coalitions)
        return values[torch.arange(len(values)), :, classes.to(values.device)]

    return value


def filled_value(
    model: Model,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    grid: Grid,
    fill: float | int | Tensor = 0.0,
    probability: bool = False,
    chunk_size: int = 64,
) -> ValueFunction:
    """Output for images whose absent patches are painted over.

    Args:
        model: A module, which runs in eval mode, or any function from images to logits.
        images: Float [B, C, H, W], as the model takes them.
        target: Class index, or one an image; the predicted class if None.
        grid: Rows and columns of patches.
        fill: What absent pixels become, in the space of `images`: a number, or a tensor that
            broadcasts to them. 0 is the mean colour of normalised images.
        probability: Softmax probabilities instead of logits.
        chunk_size: Masked images that run at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a fill that does not broadcast to the images.
        ImageError: Images that the model refuses.
        TargetError: A class that the model does not have.
    """
    explained = ExplainedModel(model, grid=grid)
    classes = _classes(explained, images, target, chunk_size)
    games = PixelGames(
        explained,
        images,
        classes,
        grid,
        fill=fill if isinstance(fill, Tensor) else float(fill),
        score="probability" if probability else "logit",
        chunk_size=chunk_size,
    )

    def value(coalitions: Coalitions) -> Float[Tensor, "batch coalitions"]:
        """Values of coalitions of patches."""
        with explained.evaluated():
            return games(coalitions)

    return value


def _classes(
    model: ExplainedModel, images: Tensor, target: int | Tensor | None, chunk_size: int
) -> Tensor:
    check_at_least("chunk_size", chunk_size, 1)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ImageError(f"images are {came}; expected [B, C, H, W], B >= 1.")
    model.check(images)
    with model.evaluated(), torch.no_grad():
        logits = torch.cat([model.logits(part) for part in images.split(chunk_size)])
    return check_target(target, logits)
