"""Where a path to the image starts: grey, black, blurred, or as given."""

import torch
from torch import Tensor

from shapwrap._types import Images
from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.masking.fillers import blurred, given_pixels, normalised_black

Baseline = str | Tensor
"""A name, or what `check_baseline` says of tensors."""

NAMES = ("zero", "black", "blur")

BLUR = 10 / 224
"""Standard deviation of the blur, as a share of the shorter side."""


def check_baseline(baseline: object) -> None:
    """Raise unless it is a name, or a tensor.

    Raises:
        ArgumentError: Neither.
    """
    if not isinstance(baseline, Tensor) and baseline not in NAMES:
        raise ArgumentError(
            f"baseline is {baseline!r}; expected one of {', '.join(map(repr, NAMES))}, or a tensor "
            "of normalised pixels."
        )


def baseline_images(baseline: Baseline, images: Images, model: ExplainedModel) -> Images:
    """One baseline an image, like the images.

    Args:
        baseline: "zero" is the mean colour of the training set, since images are normalised;
            "black" is (0 - mean) / std; "blur" is the image after a Gaussian of 10 pixels at 224;
            a tensor is normalised pixels that broadcast to the images.
        images: Normalised.
        model: Whose mean and standard deviation "black" is computed from.

    Raises:
        ArgumentError: "black" without statistics, or a tensor of another shape or not finite.
    """
    if isinstance(baseline, Tensor):
        return given_pixels(baseline, images, "baseline").expand_as(images)
    if baseline == "blur":
        return blurred(images, BLUR * min(images.shape[-2:]))
    if baseline == "zero":
        return torch.zeros_like(images)
    normalization = model.normalization
    if normalization is None or len(normalization.mean) != images.shape[1]:
        raise ArgumentError(
            "baseline is 'black', but the model does not tell the mean and standard deviation of "
            "its pixels; pass the black image, normalised, as a tensor [C, 1, 1]."
        )
    return normalised_black(images, *normalization).expand_as(images)
