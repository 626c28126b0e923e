"""Random coalitions: exact draws from the Shapley kernel and from uniform sizes."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Coalitions, Pairing
from shapwrap.errors import ArgumentError, CoalitionError

Distribution = Literal["shapley", "uniform"]


def size_probabilities(
    num_patches: int, distribution: Distribution | str = "shapley"
) -> Float[Tensor, " sizes"]:
    """Probability of each coalition size 0..N, as float64 of length N + 1.

    Args:
        num_patches: N, the number of players.
        distribution: `"shapley"`, proportional to 1 / (k (N - k)) for 0 < k < N: the kernel of
            Eq. 4 summed over all coalitions of one size. `"uniform"`, equal for 0 < k < N.

    Raises:
        ArgumentError: N is below 2, or the distribution is unknown.

    References:
        Fan, Yang & Ma 2026, Eq. 4; Charnes et al. 1988.
    """
    if num_patches < 2:
        raise ArgumentError(
            f"num_patches is {num_patches}; a proper coalition needs at least 2 patches. "
            "Use a larger image, or grid= for a finer patch grid."
        )
    if distribution not in get_args(Distribution):
        raise ArgumentError(
            f"distribution is {distribution!r}; expected one of {get_args(Distribution)}."
        )
    sizes = torch.arange(num_patches + 1, dtype=torch.float64)
    proper = (sizes > 0) & (sizes < num_patches)
    weights = proper.double()
    if distribution == "shapley":
        weights = weights / (sizes * (num_patches - sizes)).clamp(min=1)
    return weights / weights.sum()


def sample_coalitions(
    batch: int,
    num_patches: int,
    num: int = 2,
    *,
    distribution: Distribution | str = "shapley",
    paired: Pairing | str = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Coalitions:
    """Random coalitions, bool [batch, num, num_patches], True where a patch is present.

    A size is drawn first, then a subset of that size uniformly, so every draw is exactly from the
    distribution and no coalition is empty or full.

    Args:
        batch: Number of images.
        num_patches: N, the number of players.
        num: Coalitions an image; even with `paired=True`.
        distribution: `"shapley"` (Eq. 4) or `"uniform"` sizes.
        paired: Coalition 2i + 1 is the complement of coalition 2i. Pairs lower the variance
            (Covert & Lee 2021), and a token model evaluates a pair in one pass. "across" pairs
            two images instead: the coalitions of image 2i + 1 are the complements of those of
            image 2i. Each is still a draw of its own for its image, and the token model takes
            half a pass an image and coalition.
        generator: Source of randomness; torch's default generator if None.
        device: Where the result lies. Drawn on the generator's device and moved, so that a seed
            gives the same coalitions on every device. Defaults to the generator's device.

    Raises:
        CoalitionError: `paired=True` with an odd `num`.
        ArgumentError: batch or num below 1, N below 2, unknown distribution or pairing.

    References:
        Fan, Yang & Ma 2026, Eq. 4.
    """
    if batch < 1 or num < 1:
        raise ArgumentError(f"batch is {batch} and num is {num}; both must be at least 1.")
    if not isinstance(paired, bool) and paired != "across":
        raise ArgumentError(f"paired is {paired!r}; expected True, False or 'across'.")
    if paired is True and num % 2:
        raise CoalitionError(
            f"num is {num}; paired coalitions come in twos. Pass an even num, or paired='across' "
            "or False."
        )
    source = generator.device if generator is not None else torch.device("cpu")
    images = (batch + 1) // 2 if paired == "across" else batch
    draws = num // 2 if paired is True else num
    probabilities = size_probabilities(num_patches, distribution).to(source)
    sizes = torch.multinomial(probabilities, images * draws, replacement=True, generator=generator)
    scores = torch.rand(
        images * draws, num_patches, dtype=torch.float64, generator=generator, device=source
    )
    # The k patches with the smallest scores are a uniform subset of size k; ranking, unlike a
    # threshold, gives exactly k even where two scores are equal.
    ranks = scores.argsort(dim=1).argsort(dim=1)
    drawn = (ranks < sizes[:, None]).view(images, draws, num_patches)
    if paired is True:
        drawn = torch.stack((drawn, ~drawn), dim=2).flatten(1, 2)
    elif paired == "across":
        drawn = torch.stack((drawn, ~drawn), dim=1).flatten(0, 1)[:batch]
    return drawn if device is None else drawn.to(device)
