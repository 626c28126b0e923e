"""Checks of the images that a user passes in."""

import torch
from torch import Tensor, nn

from shapwrap.errors import ImageError, ImageTypeError


def check_images(images: Tensor, channels: int, like: Tensor) -> None:
    """Raise unless `images` is a float tensor [B, C, H, W] where the model lies.

    Reads no pixel, so it never waits for the device.

    Raises:
        ImageTypeError: Not a floating-point tensor.
        ImageError: Wrong shape, channels or device.
    """
    if not isinstance(images, Tensor):
        raise ImageTypeError(
            f"images are {type(images).__name__}; expected a float tensor [B, C, H, W], "
            "normalised as the model was trained."
        )
    if not images.is_floating_point():
        raise ImageTypeError(
            f"images are {images.dtype}; expected floating point, normalised as the model was "
            "trained. Divide by 255 and apply the mean and standard deviation of the model."
        )
    if images.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise ImageTypeError(
            f"images are {images.dtype}, the model is {like.dtype}; use images.to({like.dtype})."
        )
    if images.ndim != 4 or images.shape[0] == 0:
        hint = " Add the batch axis with images[None]." if images.ndim == 3 else ""
        raise ImageError(
            f"images have shape {tuple(images.shape)}; expected [B, C, H, W], B >= 1.{hint}"
        )
    if images.shape[1] != channels:
        raise ImageError(
            f"images have {images.shape[1]} channels; this model was built for {channels}."
        )
    if images.device != like.device:
        raise ImageError(
            f"images lie on {images.device}, the model on {like.device}; "
            f"use images.to({str(like.device)!r})."
        )


def first_weight(model: nn.Module) -> Tensor | None:
    """A weight that tells where a model lies and in which precision it takes images; None without.

    That of a layer, where there is one: models whose layers alone are in half precision keep norms
    and tokens in float32.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layer = next((m for m in model.modules() if isinstance(m, kinds)), model)
    weights = (p for m in (layer, model) for p in m.parameters() if p.is_floating_point())
    return next(weights, None)


def check_finite(images: Tensor) -> None:
    """Raise if any pixel is NaN or infinite; waits for the device.

    Raises:
        ImageError: Which images.
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise ImageError(
            f"images {bad} contain NaN or infinity; expected finite pixels. "
            "Look at the decoding and the normalisation of these images."
        )
