"""How many cells are gone at each step."""

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.metrics.removal import Interval

ROUNDING = 1e-6
"""Cells by which a share may miss a whole number of them."""

ATTCAT = "attcat"
"""The nine steps 1/9, 2/9, ... 1 of AttCAT's script, rounded, none twice."""


def removed_counts(num_cells: int, steps: int, fractions: object) -> list[int]:
    """Number of cells that are gone at each step.

    Args:
        num_cells: N.
        steps: Without `fractions`, this many from 10 % to 90 %, evenly spaced; one is 10 %.
        fractions: Shares in [0, 1], each floor(g N) cells, g in its own precision; or "attcat".

    Raises:
        ArgumentError: No step, or a share outside [0, 1].
    """
    if isinstance(fractions, str):
        if fractions != ATTCAT:
            raise ArgumentError(
                f"fractions is {fractions!r}; expected shares in [0, 1], {ATTCAT!r} or None."
            )
        return sorted({round(Fraction(step * num_cells, 9)) for step in range(1, 10)})
    if fractions is None:
        check_at_least("steps", steps, 1)
        gaps = max(steps - 1, 1)
        return [num_cells * (10 * gaps + 80 * step) // (100 * gaps) for step in range(steps)]
    try:
        shares = [float(share) for share in cast(Iterable[float], fractions)]
    except (TypeError, ValueError):
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ArgumentError(f"fractions is {fractions!r}; expected at least one share in [0, 1].")
    # In binary, 0.29 of 100 cells and 1/49 of 49 fall just short of 29 and 1.
    rounding = ROUNDING
    if isinstance(fractions, Tensor) and fractions.is_floating_point():
        rounding += num_cells * torch.finfo(fractions.dtype).eps
    return [math.floor(share * num_cells + rounding) for share in shares]


def equal_groups(num_cells: int, num_groups: int) -> list[Interval]:
    """Disjoint intervals of ranks with bounds floor(N i / K).

    Raises:
        ArgumentError: Fewer than two groups, or more groups than cells.
    """
    check_at_least("num_groups", num_groups, 2)
    if num_groups > num_cells:
        raise ArgumentError(
            f"num_groups is {num_groups} for {num_cells} cells; expected at most one group a cell."
        )
    bounds = [num_cells * group // num_groups for group in range(num_groups + 1)]
    return list(pairwise(bounds))
