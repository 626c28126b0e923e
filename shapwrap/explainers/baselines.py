"""Where a path to the image starts: grey, black, blurred, or as given."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError, ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel

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
        return _given(baseline, images)
    if baseline == "blur":
        return _blurred(images)
    if baseline == "zero":
        return torch.zeros_like(images)
    normalization = _statistics(model)
    if normalization is None or len(normalization.mean) != images.shape[1]:
        raise ArgumentError(
            "baseline is 'black', but the model does not tell the mean and standard deviation of "
            "its pixels; pass the black image, normalised, as a tensor [C, 1, 1]."
        )
    mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in normalization)
    return (-mean / std).expand_as(images)


def _statistics(model: ExplainedModel) -> Normalization | None:
    """As the model tells them, or the adapter that knows its library."""
    if model.normalization is not None or model.module is None:
        return model.normalization
    try:
        return model.backbone.normalization()
    except ShapwrapError:
        return None


def _given(baseline: Tensor, images: Images) -> Images:
    try:
        spread = baseline.detach().to(images).expand_as(images)
    except RuntimeError as error:
        raise ArgumentError(
            f"baseline has shape {tuple(baseline.shape)}; expected one that broadcasts to the "
            f"images, {tuple(images.shape)}."
        ) from error
    if not torch.isfinite(spread).all():
        raise ArgumentError("baseline has NaN or infinity; expected finite pixels.")
    return spread


def _blurred(images: Images) -> Images:
    """A separable Gaussian, cut at three standard deviations, borders repeated."""
    channels = images.shape[1]
    deviation = BLUR * min(images.shape[-2:])
    radius = max(1, math.ceil(3 * deviation))
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-((places / deviation) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    padded = functional.pad(images, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel, groups=channels)
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=channels)
