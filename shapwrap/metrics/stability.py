"""Stability: how much a map changes when the image hardly does."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.metrics.cost import MethodCall
from shapwrap.metrics.protocol import Protocol


class Stability(NamedTuple):
    """Relative change ||phi(x + noise) - phi(x)|| / ||phi(x)||, Euclidean, one row an image."""

    maximum: Float[Tensor, " batch"]
    """Largest over the noisy copies: max-sensitivity."""
    mean: Float[Tensor, " batch"]
    """Mean over the noisy copies."""
    changes: Float[Tensor, "batch samples"]
    """Of each noisy copy; NaN for a map that is 0 everywhere."""
    protocol: Protocol
    """Every choice, in words."""


def stability(
    explainer: MethodCall,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    radius: float | int = 0.02,
    num_samples: int = 10,
    chunk_size: int = 64,
    generator: torch.Generator | None = None,
) -> Stability:
    """Relative change of the values under uniform noise in [-radius, radius] on every pixel.

    The class stays that of the clean image. For a method that draws, the change includes what its
    own randomness changes.

    Args:
        explainer: Callable on images and target that returns an `Explanation`.
        images: Float [B, C, H, W], as the explainer takes them.
        target: Class index, or one an image; the class predicted on the clean image if None.
        radius: In the units of `images`, above 0.
        num_samples: Noisy copies of each image.
        chunk_size: Noisy images that are explained at a time.
        generator: Source of randomness, on the CPU; a new one with seed 0 if None.

    Raises:
        ArgumentError: A radius or number outside its range.

    References:
        Yeh et al. 2019, "On the (In)fidelity and Sensitivity of Explanations", Eq. 4.
    """
    if not 0 < radius < math.inf:
        raise ArgumentError(f"radius is {radius!r}; expected a finite number above 0.")
    for name, number in (("num_samples", num_samples), ("chunk_size", chunk_size)):
        check_at_least(name, number, 1)
    generator = generator or torch.Generator().manual_seed(0)
    clean: Any = explainer(images, target)
    values, classes = clean.values.double(), clean.target
    batch = len(images)
    of_image = torch.arange(batch, device=images.device).repeat_interleave(num_samples)
    noisy_values = []
    for rows in of_image.split(chunk_size):
        shape = (len(rows), *images.shape[1:])
        noise = (2 * torch.rand(shape, generator=generator) - 1) * radius
        noisy: Any = explainer(images[rows] + noise.to(images), classes[rows])
        noisy_values.append(noisy.values.double())
    change = torch.cat(noisy_values).view(batch, num_samples, -1) - values[:, None]
    norms = values.norm(dim=1, keepdim=True)
    changes = torch.where(norms > 0, change.norm(dim=2) / norms, torch.nan)
    undefined = int(changes[:, 0].isnan().sum())
    if undefined:
        warnings.warn(
            f"the relative change of {undefined} of {batch} maps is undefined: they are 0 "
            "everywhere.",
            stacklevel=2,
        )
    settings = {
        "change": "|phi(x + noise) - phi(x)| / |phi(x)|, Euclidean",
        "noise": f"uniform in [-{radius:g}, {radius:g}] on every pixel, {num_samples} copies",
        "class": "predicted on the clean image" if target is None else "given",
        "images": f"{tuple(images.shape)}, {images.dtype}, {images.device.type}",
        "seed": str(generator.initial_seed()),
    }
    protocol = Protocol.of("stability", settings)
    return Stability(changes.amax(dim=1), changes.mean(dim=1), changes, protocol)
