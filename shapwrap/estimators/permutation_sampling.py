"""Permutation sampling: what each player adds when players come in a random order."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapwrap.errors import ArgumentError, EstimationError
from shapwrap.estimators.convergence import RunningMoments
from shapwrap.estimators.games import Value
from shapwrap.estimators.result import ShapleyEstimate
from shapwrap.estimators.rounds import Rounds, run

MIN_ORDERS = 10
"""Pairs of orders that a standard error needs before it decides."""


def permutation_sampling(
    value: Value,
    batch: int,
    num_patches: int,
    *,
    threshold: float | None = 0.01,
    max_coalitions: int = 131_072,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> ShapleyEstimate:
    """Shapley values of a batch of games from random orders; unbiased and exactly efficient.

    Each order is used forwards and backwards (antithetic), which takes 2 (N - 1) coalitions, all of
    them complement pairs. All games get the same orders, and each stops at its own convergence.

    Args:
        value: As in `kernel_shap`.
        batch: B.
        num_patches: N, the number of players.
        threshold: Stop once the largest standard error over the range of the values is below this
            in every class; None to use all `max_coalitions`.
        max_coalitions: Upper limit for each game, at least 2 (N - 1).
        batch_size: Coalitions evaluated at a time, rounded to whole pairs of orders, at least one.
        generator: Source of randomness; a new one with seed 0 if None.

    Raises:
        ArgumentError: A number out of range, or games that give other shapes.
        EstimationError: Not one pair of orders fits, or values are not finite.

    Warns:
        ConvergenceWarning: The threshold was not reached.

    References:
        Castro, Gomez & Tejada 2009; Mitchell et al. 2022 (antithetic orders).
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}; expected at least 1.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rounds = _Orders(num_patches, batch_size, generator)
    return run(
        value, batch, num_patches, rounds, threshold=threshold, max_coalitions=max_coalitions
    )


class _Orders(Rounds):
    method = "permutation sampling, antithetic"

    def __init__(self, num_patches: int, batch_size: int, generator: torch.Generator):
        self._num_patches = num_patches
        self._cost = 2 * (num_patches - 1)
        self._at_a_time = max(1, batch_size // max(self._cost, 1))
        self._generator = generator
        self._ranks = torch.empty(0)
        self._moments = RunningMoments()

    def draw(self, room: int) -> Bool[Tensor, "coalitions patches"] | None:
        number = min(self._at_a_time, room // self._cost)
        if number < 1:
            return None
        draws = torch.rand(
            number,
            self._num_patches,
            dtype=torch.float64,
            generator=self._generator,
            device=self._generator.device,
        )
        # When each player comes, from 0 to N - 1.
        self._ranks = draws.argsort(dim=1).argsort(dim=1)
        sizes = torch.arange(1, self._num_patches, device=draws.device)
        first = self._ranks[:, None, :] < sizes[:, None]
        return torch.stack((first, ~first), dim=2).flatten(0, 2)

    def add(
        self,
        coalitions: Bool[Tensor, "coalitions patches"],
        gains: Float[Tensor, "batch coalitions classes"],
        total: Float[Tensor, "batch classes"],
    ) -> bool:
        ranks = self._ranks.to(gains.device)
        number, num_patches = ranks.shape
        gains = gains.unflatten(1, (number, num_patches - 1, 2))
        everybody = total[:, None, None].expand(-1, number, 1, -1)
        nobody = torch.zeros_like(everybody)
        forwards = torch.cat((nobody, gains[..., 0, :], everybody), dim=2).diff(dim=2)
        # Backwards, a player joins those who come after it: the complements, read from the end.
        backwards = -torch.cat((everybody, gains[..., 1, :], nobody), dim=2).diff(dim=2)
        by_time = (forwards + backwards) / 2
        index = ranks[None, :, :, None].expand(*by_time.shape)
        self._moments.add(by_time.gather(2, index))
        return self._moments.count >= MIN_ORDERS

    def estimate(self, total: Float[Tensor, "batch classes"]) -> tuple[Tensor, Tensor]:
        if self._moments.count == 0:
            raise EstimationError(
                f"one pair of orders of {self._num_patches} players takes {self._cost} coalitions; "
                f"expected max_coalitions of at least {self._cost}."
            )
        return self._moments.mean, (self._moments.variance() / self._moments.count).sqrt()

    def keep(self, kept: Bool[Tensor, " batch"]) -> None:
        self._moments.keep(kept)
