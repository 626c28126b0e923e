"""SaCo: whether parts with more salience matter more to the prediction."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.metrics.removal import Interval


def salience_guided_coefficient(
    salience: Float[Tensor, "batch cells"],
    groups: Sequence[Interval],
    probabilities: Float[Tensor, "batch groups"],
) -> Float[Tensor, " batch"]:
    """Sum of w_ij over pairs of groups i < j, divided by the sum of |w_ij|; NaN for 0/0.

    w_ij = s_i - s_j with s the summed salience, negative where group i changes the prediction less
    than group j. In [-1, 1].

    Args:
        salience: Of the cells of each image, sorted, the highest first.
        groups: Intervals of that order.
        probabilities: Of the target with one group replaced.

    References:
        Wu et al. 2024, "On the Faithfulness of Vision Transformer Explanations".
    """
    # Only ratios count; sums of large values would overflow.
    salience = salience / salience.abs().amax(dim=1, keepdim=True)
    sums = torch.stack([salience[:, first:after].sum(dim=1) for first, after in groups], dim=1)
    gaps = sums[:, :, None] - sums[:, None, :]
    # A drop p - p_i is at least p - p_j where p_i is at most p_j: one rounding less.
    agree = probabilities[:, :, None] <= probabilities[:, None, :]
    first, second = torch.triu_indices(len(groups), len(groups), offset=1, device=sums.device)
    weights = torch.where(agree, gaps, -gaps)[:, first, second]
    return weights.sum(dim=1) / weights.abs().sum(dim=1)
