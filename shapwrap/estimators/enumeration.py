"""Enumeration: the Shapley values themselves, from all coalitions of few players."""

import math

import torch

from shapwrap.coalitions.exact import all_coalitions
from shapwrap.errors import ArgumentError
from shapwrap.estimators.games import OpenGames, Value
from shapwrap.estimators.result import ShapleyEstimate, without_class_axis


def enumerate_coalitions(
    value: Value, batch: int, num_patches: int, *, batch_size: int = 256
) -> ShapleyEstimate:
    """Exact Shapley values of a batch of games with at most 16 players.

    Coalitions run in complement pairs, and their values are not kept.

    Args:
        value: As in `kernel_shap`.
        batch: B.
        num_patches: N, at most 16.
        batch_size: Coalitions evaluated at a time; even.

    Raises:
        ArgumentError: N is not in 1..16, an odd batch size, or games that give other shapes.
        EstimationError: Values that are not finite.

    References:
        Shapley 1953; Fan, Yang & Ma 2026, Eq. 2.
    """
    if batch_size < 2 or batch_size % 2:
        raise ArgumentError(f"batch_size is {batch_size}; expected an even number, at least 2.")
    half = all_coalitions(num_patches)[: 2 ** (num_patches - 1)]
    games = OpenGames(value, batch, num_patches)
    shape = (batch, num_patches, games.grand.shape[1])
    values = torch.zeros(shape, dtype=games.grand.dtype, device=games.grand.device)
    # phi_i is the sum over all s of v(s) times (|s| - 1)! (N - |s|)! / N! if i is in s, and
    # times -|s|! (N - |s| - 1)! / N! if not: 1 / (k C(N, k)) and -1 / ((N - k) C(N, k)).
    sizes = range(num_patches + 1)
    inside = [1 / (k * math.comb(num_patches, k)) if k else 0.0 for k in sizes]
    outside = [inside[num_patches - k] for k in sizes]
    weights = torch.tensor([inside, outside], dtype=torch.float64)
    for part in half.split(batch_size // 2):
        coalitions = torch.stack((part, ~part), dim=1).flatten(0, 1)
        size = coalitions.sum(dim=1)[:, None]
        weight = torch.where(coalitions, weights[0][size], -weights[1][size])
        # Nobody's value would cancel only up to rounding.
        gains = games(coalitions) - games.empty[:, None]
        values += weight.T.to(gains) @ gains
    made = ShapleyEstimate(
        values=values,
        standard_errors=torch.zeros_like(values),
        empty=games.empty,
        grand=games.grand,
        ratio=values.new_zeros(batch),
        num_coalitions=torch.full((batch,), 2**num_patches, device=values.device),
        converged=torch.ones(batch, dtype=torch.bool, device=values.device),
        threshold=None,
        method="enumeration",
    )
    return made if games.has_classes else without_class_axis(made)
