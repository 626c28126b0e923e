"""Correlation of many pairs of samples at a time."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

ROUNDING = 1e-6
"""Standard deviation over largest value of an allocation that a float32 model spreads evenly: it is
rounding, which has no direction to compare."""


def pearson(
    first: Float[Tensor, "... samples"],
    second: Float[Tensor, "... samples"],
    *,
    rounding: float = 0.0,
) -> Float[Tensor, "..."]:
    """Pearson's r over the last axis, float64; NaN where either side is constant.

    Args:
        first: One side.
        second: The other.
        rounding: Standard deviation over largest value up to which a side counts as constant.
    """
    sides = []
    for side in (first.double(), second.double()):
        centred = side - side.mean(dim=-1, keepdim=True)
        # Tiny values would underflow when squared.
        largest = centred.abs().amax(dim=-1, keepdim=True)
        constant = is_constant(side, rounding)[..., None]
        sides.append(torch.where(constant, torch.nan, centred / largest))
    a, b = sides
    r = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return r.clamp(-1, 1)


def spearman(
    first: Float[Tensor, "... samples"],
    second: Float[Tensor, "... samples"],
    *,
    rounding: float = 0.0,
) -> Float[Tensor, "..."]:
    """Spearman's rho over the last axis: Pearson's r of ranks; ties share their mean rank."""
    constant = is_constant(first.double(), rounding) | is_constant(second.double(), rounding)
    return pearson(ranks(first), ranks(second)).masked_fill(constant, torch.nan)


def ranks(values: Float[Tensor, "... samples"]) -> Float[Tensor, "... samples"]:
    """Rank of each value along the last axis, from 1, float64; ties share their mean rank."""
    ordered, order = values.sort(dim=-1)
    last = ordered.shape[-1]
    places = torch.arange(1, last + 1, device=values.device).expand_as(ordered)
    starts = functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    ends = functional.pad(starts[..., 1:], (0, 1), value=True)
    first_place = torch.where(starts, places, 0).cummax(dim=-1).values
    upside_down = torch.where(ends, places, last).flip(-1)
    last_place = upside_down.cummin(dim=-1).values.flip(-1)
    shared = (first_place + last_place).double() / 2
    return torch.empty_like(shared).scatter_(-1, order, shared)


def is_constant(values: Float[Tensor, "... samples"], rounding: float = 0.0) -> Bool[Tensor, "..."]:
    """Whether the values of the last axis are one number, up to rounding."""
    same = values.amax(dim=-1) == values.amin(dim=-1)
    spread = values.std(dim=-1, correction=0)
    return same | (spread <= rounding * values.abs().amax(dim=-1))
