"""Removing pixels: what stands in their place, and what the model says then."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Images
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.masking.fillers import blurred, channel_means, given_pixels, normalised_black

FillName = Literal["zero", "black", "mean", "blur"]
Fill = FillName | float | Tensor
"""What stands in for removed pixels, in the normalised space of the images.

"zero": 0, the mean colour of the training set. "black": black before the normalisation, which must
be known. "mean": the mean colour of the image. "blur": the image under a Gaussian blur. A number:
this value. A tensor: pixels that broadcast to the images."""

Score = Literal["logit", "probability"]
"""What is explained: the logit of the target class, or its softmax probability."""

BLUR_SIGMA = 1 / 16
"""Of the blur, in shorter sides of the image: 14 pixels at 224, which leaves colours alone."""


def check_fill(fill: Fill | str) -> None:
    """Raise unless `fill` is one of those above.

    Raises:
        ArgumentError: Something else, or a number that is not finite.
    """
    if isinstance(fill, Tensor):
        return
    if isinstance(fill, str):
        valid = fill in get_args(FillName)
    else:
        valid = not isinstance(fill, bool) and math.isfinite(fill)
    if not valid:
        raise ArgumentError(
            f"fill is {fill!r}; expected one of {get_args(FillName)}, a finite number, or a tensor "
            "of normalised pixels."
        )


def check_score(score: str) -> None:
    """Raise unless `score` is one of those above.

    Raises:
        ArgumentError: Something else.
    """
    if score not in get_args(Score):
        raise ArgumentError(f"score is {score!r}; expected one of {get_args(Score)}.")


def replacement(images: Images, fill: Fill | str, normalization: Normalization | None) -> Images:
    """The pixels that stand in for removed ones, [B, C, H, W].

    Raises:
        ArgumentError: "black" without a known normalisation, or a tensor that does not broadcast
            or is not finite.
    """
    if isinstance(fill, Tensor):
        return given_pixels(fill, images).expand_as(images)
    if fill == "mean":
        return channel_means(images).expand_as(images)
    if fill == "blur":
        return blurred(images, BLUR_SIGMA * min(images.shape[-2:]))
    if fill == "black":
        if normalization is None:
            raise ArgumentError(
                'fill="black" needs the mean and standard deviation of the channels, which this '
                "model does not tell; pass fill= as a tensor of shape [C, 1, 1], (0 - mean) / std."
            )
        return normalised_black(images, *normalization).expand_as(images)
    number = 0.0 if isinstance(fill, str) else float(fill)
    return images.new_full((), number).expand_as(images)


def scores(
    model: ExplainedModel, images: Images, target: Int[Tensor, " batch"], score: str
) -> Float[Tensor, " batch"]:
    """Logit or probability of the target; float32, or float64 for a float64 model."""
    logits = model.logits(images)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(1, target[:, None])[:, 0]
    return chosen if score == "logit" else (chosen - logits.logsumexp(dim=1)).exp()


def scores_of_masked(
    model: ExplainedModel,
    images: Images,
    target: Int[Tensor, " batch"],
    number: int,
    masks_of: Callable[[Tensor, Tensor], Tensor],
    filling: Images,
    *,
    score: str,
    chunk_size: int,
) -> Float[Tensor, "batch masks"]:
    """Score of every image under each of its masks, `chunk_size` masked images at a time.

    Args:
        model: In eval mode.
        images: Normalised.
        target: One class an image.
        number: Masks an image.
        masks_of: Image indices [n] and mask indices [n] to masks [n, 1, H, W]: bool, True where a
            pixel is kept, or float, the share of a pixel that is kept.
        filling: What stands in for the rest.
        score: "logit" or "probability".
        chunk_size: Masked images that run at a time.
    """
    found = []
    for chunk in torch.arange(len(images) * number, device=images.device).split(chunk_size):
        row = chunk // number
        mask = masks_of(row, chunk % number)
        if mask.dtype == torch.bool:
            # A product would keep infinite differences; a selection does not round either.
            masked = torch.where(mask, images[row], filling[row])
        else:
            masked = torch.lerp(filling[row], images[row], mask.to(images.dtype))
        found.append(scores(model, masked, target[row], score))
    return torch.cat(found).view(len(images), number)
