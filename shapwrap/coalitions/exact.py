"""Exact Shapley values of small games, by enumeration: the reference for everything else."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapwrap.coalitions.sampling import size_probabilities
from shapwrap.errors import ArgumentError

MAX_PLAYERS = 16
"""2^16 coalitions: what enumeration can still hold in memory."""


def all_coalitions(num_patches: int) -> Bool[Tensor, "subsets patches"]:
    """All 2^N coalitions; row r holds the binary digits of r, lowest bit first.

    Raises:
        ArgumentError: N is not in 1..16.
    """
    if not 1 <= num_patches <= MAX_PLAYERS:
        raise ArgumentError(
            f"num_patches is {num_patches}; enumeration needs 1..{MAX_PLAYERS}. "
            "Group patches into fewer players, or sample coalitions."
        )
    rows = torch.arange(2**num_patches)
    return (rows[:, None] >> torch.arange(num_patches)) % 2 == 1


def exact_shapley_values(
    values: Float[Tensor, "subsets *classes"],
) -> Float[Tensor, "patches *classes"]:
    """Shapley values of a game that is given by the value of every coalition.

    Args:
        values: v(s) in the order of `all_coalitions`, any unit, first axis of length 2^N.

    Raises:
        ArgumentError: The first axis is not 2^N with N in 1..16.

    References:
        Shapley 1953; Fan, Yang & Ma 2026, Eq. 2.
    """
    num_patches = _num_players(values)
    coalitions = all_coalitions(num_patches).to(values.device)
    sizes = coalitions.sum(1)
    weight_by_size = torch.tensor(
        [
            math.factorial(k) * math.factorial(num_patches - 1 - k) / math.factorial(num_patches)
            for k in range(num_patches)
        ],
        dtype=values.dtype,
        device=values.device,
    )
    rows = torch.arange(2**num_patches, device=values.device)
    shapley_values = []
    for patch in range(num_patches):
        without = rows[~coalitions[:, patch]]
        gains = values[without + 2**patch] - values[without]
        weights = weight_by_size[sizes[without]]
        shapley_values.append(torch.tensordot(weights, gains, dims=1))
    return torch.stack(shapley_values)


def kernel_regression(
    values: Float[Tensor, "subsets *classes"],
) -> Float[Tensor, "patches *classes"]:
    """Minimiser of the kernel-weighted least squares under efficiency, over all coalitions.

    It equals the Shapley value (Charnes et al. 1988): the reason that the Shapley loss works.

    Args:
        values: v(s) in the order of `all_coalitions`, first axis of length 2^N, N >= 2.

    Raises:
        ArgumentError: The first axis is not 2^N with N in 2..16.

    References:
        Lundberg & Lee 2017; Fan, Yang & Ma 2026, Eq. 3 and 4.
    """
    num_patches = _num_players(values)
    coalitions = all_coalitions(num_patches).to(values.device)
    sizes = coalitions.sum(1)
    counts = torch.tensor([math.comb(num_patches, k) for k in range(num_patches + 1)])
    probabilities = (size_probabilities(num_patches) / counts).to(values)[sizes]
    design = coalitions.to(values.dtype)
    gains = (values - values[0]).flatten(1) if values.ndim > 1 else (values - values[0])[:, None]
    quadratic = design.T @ (probabilities[:, None] * design)
    linear = design.T @ (probabilities[:, None] * gains)
    ones = torch.ones(num_patches, 1, dtype=values.dtype, device=values.device)
    free = torch.linalg.solve(quadratic, linear)
    direction = torch.linalg.solve(quadratic, ones)
    excess = (ones.T @ free - gains[-1:]) / (ones.T @ direction)
    return (free - direction @ excess).view(num_patches, *values.shape[1:])


def _num_players(values: Tensor) -> int:
    num_patches = values.shape[0].bit_length() - 1
    if values.shape[0] != 2**num_patches:
        raise ArgumentError(
            f"values have {values.shape[0]} rows; expected 2^N, one for each coalition in the "
            "order of all_coalitions(N)."
        )
    return num_patches
