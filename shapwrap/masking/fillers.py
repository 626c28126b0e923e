"""Pixels that stand in the place of those that are taken away."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.errors import ArgumentError
from shapwrap.masking.pooling import compute_dtype

Filler = Float[Tensor, "one_or_batch channels one_or_height one_or_width"]
"""Pixels that broadcast to the images."""


def channel_means(images: Images) -> Filler:
    """Mean over the pixels, one an image and channel."""
    return images.to(compute_dtype(images)).mean(dim=(2, 3), keepdim=True).to(images.dtype)


def normalised_black(images: Images, mean: Sequence[float], std: Sequence[float]) -> Filler:
    """What black is after the normalisation: (0 - mean) / std."""
    return (-images.new_tensor(mean) / images.new_tensor(std))[None, :, None, None]


def blurred(images: Images, sigma: float, radius: int | None = None) -> Images:
    """The images under a separable Gaussian; pixels beyond the border repeat those at it.

    Args:
        images: In any space.
        sigma: Standard deviation in pixels.
        radius: Pixels at each side where the Gaussian is cut; three standard deviations if None.
    """
    radius = max(1, math.ceil(3 * sigma)) if radius is None else radius
    channels = images.shape[1]
    exact = images.to(compute_dtype(images))
    offsets = torch.arange(-radius, radius + 1, device=images.device).to(exact.dtype)
    kernel = (-offsets.square() / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    padded = functional.pad(exact, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel, groups=channels)
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=channels).to(images.dtype)


def given_pixels(pixels: Tensor, images: Images, name: str = "fill") -> Filler:
    """Pixels of the caller's own, in the precision and on the device of the images.

    Raises:
        ArgumentError: They do not broadcast to the images, or are not finite.
    """
    fits = pixels.ndim <= 4 and all(
        own in (1, whole)
        for own, whole in zip(pixels.shape[::-1], images.shape[::-1], strict=False)
    )
    if not fits:
        raise ArgumentError(
            f"{name} has shape {tuple(pixels.shape)}; expected one that broadcasts to the images, "
            f"{tuple(images.shape)}: each size 1 or theirs."
        )
    if not torch.isfinite(pixels).all():
        raise ArgumentError(f"{name} has NaN or infinity; expected finite pixels.")
    filler = pixels.detach().to(images)[(None,) * (4 - pixels.ndim)]
    return filler.expand(-1, images.shape[1], -1, -1)
