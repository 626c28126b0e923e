"""What is put in the place of pixels that are taken away."""

import torch
from torch import Tensor

from shapwrap._types import Images
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.masking.fillers import Filler, blurred, channel_means, given_pixels

NATIVE = "native"
"""No filler: patches are removed as the wrapped model does it."""

TOLERATED = 1e-3
"""Beyond [0, 1]: what resizing and undoing a normalisation leave."""

BLUR_RADIUS = 5
BLUR_SIGMA = 5.0

FILLS = {
    "black": "black, 0 in [0, 1], before normalisation",
    "mean": "mean of each channel of the image in [0, 1], before normalisation",
    "zero_normalised": "mean colour of the model, 0 after normalisation",
    "blur": f"the image blurred by a Gaussian of sigma {BLUR_SIGMA:g} pixels, 11 x 11",
    "random": "uniform random colours in [0, 1], one drawing an image",
}
"""Fillers by name, and what they are in words."""


def is_native(fill: str | Tensor) -> bool:
    """Whether patches are removed by the model instead of filled."""
    return not isinstance(fill, Tensor) and fill == NATIVE


def check_fill(fill: str | Tensor, *, beside: str | Tensor | None = None) -> None:
    """Raise unless `fill` is a known name or a tensor.

    Args:
        fill: A name or pixels.
        beside: Another filler of the same measurement: both are native, or none.

    Raises:
        ArgumentError: An unknown name, pixels outside [0, 1], or one native filler of two.
    """
    if beside is not None and is_native(fill) != is_native(beside):
        raise ArgumentError(
            f"one filler is {NATIVE!r} and the other is not; expected both or none: pixels and "
            "patches have rankings of their own. Call insertion_deletion twice."
        )
    known = isinstance(fill, Tensor) or is_native(fill) or fill in FILLS
    if not known:
        names = ", ".join(map(repr, FILLS))
        raise ArgumentError(
            f"fill is {fill!r}; expected one of {names}, {NATIVE!r}, or a tensor of pixels in "
            "[0, 1] that broadcasts to the images."
        )
    if isinstance(fill, Tensor) and fill.numel():
        low, high = fill.amin().item(), fill.amax().item()
        if low < -TOLERATED or high > 1 + TOLERATED:
            raise ArgumentError(
                f"fill is a tensor of values between {low:.3g} and {high:.3g}; expected pixels in "
                "[0, 1], before normalisation, as the images are."
            )


def make_filler(
    fill: str | Tensor,
    images: Images,
    normalization: Normalization | None,
    generator: torch.Generator | None,
) -> Filler:
    """Pixels in [0, 1] that broadcast to the images, in their precision.

    Args:
        fill: A key of `FILLS`, or pixels of the caller's own.
        images: In [0, 1].
        normalization: Of the model, where `predict` tells.
        generator: For "random"; a new one with seed 0 if None.

    Raises:
        ArgumentError: "zero_normalised" without known statistics, or a tensor that does not
            broadcast to the images or is not finite.
    """
    if isinstance(fill, Tensor):
        return _of_caller(fill, images)
    if fill == "mean":
        return channel_means(images)
    if fill == "zero_normalised":
        return _mean_colour(images, normalization)
    if fill == "blur":
        return blurred(images, BLUR_SIGMA, BLUR_RADIUS)
    if fill == "random":
        generator = generator or torch.Generator().manual_seed(0)
        drawn = torch.rand(images.shape, generator=generator, device=generator.device)
        return drawn.to(images)
    return images.new_zeros(1, images.shape[1], 1, 1)


def describe(fill: str | Tensor) -> str:
    """The filler in words, for the protocol."""
    if isinstance(fill, Tensor):
        return f"pixels given, tensor {tuple(fill.shape)} in [0, 1], before normalisation"
    return FILLS[fill]


def _of_caller(fill: Tensor, images: Images) -> Filler:
    if not fill.is_floating_point():
        raise ArgumentError(f"fill is a tensor of {fill.dtype}; expected floats in [0, 1].")
    return given_pixels(fill[:, None, None] if fill.ndim == 1 else fill, images)


def _mean_colour(images: Images, normalization: Normalization | None) -> Filler:
    if normalization is None:
        raise ArgumentError(
            "fill='zero_normalised' needs the normalisation, which a plain function does not "
            "tell; pass predict=shapwrap.metrics.predictor(model), or the colour as a tensor [C]."
        )
    if len(normalization.mean) != images.shape[1]:
        raise ArgumentError(
            f"the normalisation has {len(normalization.mean)} channels, the images "
            f"{images.shape[1]}; expected the same number."
        )
    return images.new_tensor(normalization.mean)[None, :, None, None]
