"""The coalitions of one batch."""

from typing import Protocol

import torch
from torch import Tensor

from shapwrap.coalitions.sampling import Distribution, sample_coalitions


class Patched(Protocol):
    """A wrapped model, of classes or of texts."""

    def patches_of(self, images: Tensor) -> int:
        """N of these images."""
        ...


def fresh_coalitions(
    wrapped: Patched,
    images: Tensor,
    num_coalitions: int,
    distribution: Distribution,
    generator: torch.Generator,
) -> Tensor:
    """Complement pairs for each image, bool [B, S, N], where the images lie."""
    drawn = sample_coalitions(
        len(images),
        wrapped.patches_of(images),
        num_coalitions,
        distribution=distribution,
        generator=generator,
    )
    return drawn.to(images.device, non_blocking=True)
