"""Correlations over patches, for many images and classes at once."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_SPREAD = 1e-6
"""Standard deviation over largest value, below which values count as constant: an allocation that
is even up to the rounding of a float32 model has no direction to compare."""


def pearson(
    first: Float[Tensor, "*batch patches"], second: Float[Tensor, "*batch patches"]
) -> Float[Tensor, "*batch"]:
    """Pearson correlation over the last axis; NaN where either side is constant."""
    sides = []
    for values in (first, second):
        centred = values - values.mean(dim=-1, keepdim=True)
        sides.append(centred / centred.square().sum(dim=-1, keepdim=True).sqrt())
    correlation = (sides[0] * sides[1]).sum(dim=-1).clamp(-1, 1)
    constant = is_constant(first) | is_constant(second)
    return correlation.masked_fill(constant, torch.nan)


def spearman(
    first: Float[Tensor, "*batch patches"], second: Float[Tensor, "*batch patches"]
) -> Float[Tensor, "*batch"]:
    """Pearson correlation of the ranks, ties sharing theirs; NaN where either side is constant."""
    correlation = pearson(average_ranks(first), average_ranks(second))
    constant = is_constant(first) | is_constant(second)
    return correlation.masked_fill(constant, torch.nan)


def average_ranks(values: Float[Tensor, "*batch patches"]) -> Float[Tensor, "*batch patches"]:
    """Ranks from 1 over the last axis; equal values get the mean of their ranks."""
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).to(values.dtype) / 2


def is_constant(values: Float[Tensor, "*batch patches"]) -> Tensor:
    """Whether the values of the last axis are one number, up to rounding."""
    spread = values.std(dim=-1, correction=0)
    return spread <= SMALLEST_SPREAD * values.abs().amax(dim=-1)
