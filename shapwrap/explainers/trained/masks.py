"""Coalitions that surrogates and explainers are trained on."""

from typing import Literal

import torch
from torch import Tensor

from shapwrap._types import Coalitions
from shapwrap.coalitions.sampling import sample_coalitions, size_probabilities

MaskDistribution = Literal["shapley", "vit-shapley"]
"""The exact Shapley kernel, or what the code of ViT-Shapley draws instead."""


def sample_uniform_sizes(
    batch: int, num_patches: int, num: int = 1, *, generator: torch.Generator
) -> Coalitions:
    """Coalitions of every size 0..N with the same probability, bool [batch, num, N].

    One threshold t ~ U(0, 1) a coalition; patch i is present where its own U_i > t. Empty and full
    coalitions are among them, unlike those of `sample_coalitions(distribution="uniform")`: a
    surrogate is asked for both.

    References:
        Jethani et al. 2022 (FastSHAP); Covert et al. 2023 (ViT-Shapley).
    """
    source = generator.device
    threshold = torch.rand(batch, num, 1, generator=generator, device=source, dtype=torch.float64)
    draws = torch.rand(
        batch, num, num_patches, generator=generator, device=source, dtype=torch.float64
    )
    return draws > threshold


def sample_kernel(
    batch: int,
    num_patches: int,
    num: int,
    *,
    distribution: MaskDistribution | str,
    paired: bool,
    generator: torch.Generator,
) -> Coalitions:
    """Coalitions for the weighted least squares of an explainer, bool [batch, num, N].

    Args:
        batch: Images.
        num_patches: N.
        num: Coalitions an image; even if `paired`.
        distribution: "shapley" is the kernel, exactly. "vit-shapley" is what that method's code
            draws, to reproduce it: sizes off by one and patches kept independently, so that at
            N = 196 about one coalition in eight is empty or full and tells nothing.
        paired: Coalition 2i + 1 is the complement of coalition 2i.
        generator: Source of randomness.
    """
    if distribution == "shapley":
        return sample_coalitions(batch, num_patches, num, paired=paired, generator=generator)
    draws = num // 2 if paired else num
    drawn = _published(batch * draws, num_patches, generator).unflatten(0, (batch, draws))
    return torch.stack((drawn, ~drawn), dim=2).flatten(1, 2) if paired else drawn


def _published(num: int, num_patches: int, generator: torch.Generator) -> Tensor:
    source = generator.device
    probabilities = size_probabilities(num_patches)[1:num_patches].to(source)
    # The kernel's probability of size k + 1 is given to k absent patches in expectation.
    absent = torch.multinomial(probabilities, num, replacement=True, generator=generator)
    draws = torch.rand(num, num_patches, generator=generator, device=source, dtype=torch.float64)
    return draws >= absent[:, None] / num_patches
