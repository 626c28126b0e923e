"""Players of a game: single patches, or blocks of patches that come and go together."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.errors import ArgumentError


def player_of_patch(grid: Grid, players: Grid) -> Int[Tensor, " patches"]:
    """Which player each patch belongs to, row by row: patch row r to floor(r * rows / h).

    Args:
        grid: Rows and columns of patches.
        players: Rows and columns of players, no more than patches.

    Raises:
        ArgumentError: Not two positive ints, or more players than patches along an axis.
    """
    valid = isinstance(players, tuple | list) and len(players) == 2
    if not valid or not all(
        isinstance(n, int) and 1 <= n <= patches for n, patches in zip(players, grid, strict=True)
    ):
        raise ArgumentError(
            f"players is {players!r}; expected (rows, columns), from (1, 1) to the patch grid "
            f"{grid}: a player is one patch or a block of patches."
        )
    row = torch.arange(grid[0]) * players[0] // grid[0]
    column = torch.arange(grid[1]) * players[1] // grid[1]
    return (row[:, None] * players[1] + column).flatten()


def patches_of(
    coalitions: Bool[Tensor, "*batch players"], owner: Int[Tensor, " patches"]
) -> Bool[Tensor, "*batch patches"]:
    """Coalitions of players as coalitions of patches."""
    return coalitions[..., owner.to(coalitions.device)]


def sums_over_players(
    values: Float[Tensor, "batch patches *classes"], owner: Int[Tensor, " patches"]
) -> Float[Tensor, "batch players *classes"]:
    """Values of patches, added up for each player."""
    owner = owner.to(values.device)
    sums = values.new_zeros(values.shape[0], int(owner.max()) + 1, *values.shape[2:])
    return sums.index_add(1, owner, values)
