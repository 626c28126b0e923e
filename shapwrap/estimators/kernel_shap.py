"""KernelSHAP: Shapley values as a weighted regression on sampled coalitions."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.errors import ArgumentError, EstimationError
from shapwrap.estimators.convergence import RunningMoments
from shapwrap.estimators.games import Value
from shapwrap.estimators.result import ShapleyEstimate
from shapwrap.estimators.rounds import Rounds, run

MIN_GROUPS = 5
"""Independent estimates that a standard error needs."""


def kernel_shap(
    value: Value,
    batch: int,
    num_patches: int,
    *,
    threshold: float | None = 0.01,
    paired: bool = True,
    exact_matrix: bool = False,
    max_coalitions: int = 131_072,
    batch_size: int = 256,
    variance_batches: int | None = None,
    generator: torch.Generator | None = None,
) -> ShapleyEstimate:
    """Shapley values of a batch of games by regression; exactly efficient, in constant memory.

    With coalitions s from the Shapley kernel, A = mean of s s^T, b = mean of s (v(s) - v(0)) and
    D = v(1) - v(0): phi = A^-1 b - A^-1 1 (1^T A^-1 b - D) / (1^T A^-1 1).

    All games are asked for the same coalitions, and each stops at its own convergence, so that a
    batch gives what its games give one by one with the same seed.

    Args:
        value: Coalitions, bool [B, S, N] on the generator's device, to values, [B, S, K] or [B, S].
            With a method `select(rows)`, games that have converged are not evaluated any more.
        batch: B.
        num_patches: N, the number of players.
        threshold: Stop once the largest standard error over the range of the values is below this
            in every class; None to use all `max_coalitions`.
        paired: Draw each coalition with its complement, which lowers the variance.
        exact_matrix: Use the expectation of A instead of its sample mean: unbiased, but with a
            larger variance.
        max_coalitions: Upper limit for each game.
        batch_size: Coalitions evaluated at a time.
        variance_batches: Batches that make one of the independent estimates whose spread gives the
            standard errors; by default enough for 10 N coalitions.
        generator: Source of randomness; a new one with seed 0 if None.

    Raises:
        ArgumentError: A number out of range, or games that give other shapes.
        EstimationError: A is singular (too few coalitions), or values are not finite.

    Warns:
        ConvergenceWarning: The threshold was not reached.

    References:
        Lundberg & Lee 2017; Covert & Lee 2021, "Improving KernelSHAP".
    """
    if batch_size < 1 or (paired and batch_size % 2):
        raise ArgumentError(
            f"batch_size is {batch_size}; expected at least 1, and an even number with paired=True."
        )
    if variance_batches is None:
        variance_batches = math.ceil(10 * num_patches / batch_size)
    if variance_batches < 1:
        raise ArgumentError(f"variance_batches is {variance_batches}; expected at least 1.")
    rounds = _Regression(
        num_patches, batch_size, variance_batches, paired, exact_matrix, _seeded(generator)
    )
    return run(
        value, batch, num_patches, rounds, threshold=threshold, max_coalitions=max_coalitions
    )


def expected_matrix(num_patches: int) -> Float[Tensor, "patches patches"]:
    """E s s^T under the Shapley kernel, float64: 1/2 on the diagonal, one number elsewhere.

    References:
        Covert & Lee 2021, Appendix.
    """
    if num_patches < 2:
        raise ArgumentError(f"num_patches is {num_patches}; expected at least 2.")
    sizes = range(1, num_patches)
    both = sum((k - 1) / (num_patches - k) for k in sizes)
    scale = num_patches * (num_patches - 1) * sum(1 / (k * (num_patches - k)) for k in sizes)
    matrix = torch.full((num_patches, num_patches), both / scale, dtype=torch.float64)
    return matrix.fill_diagonal_(0.5)


class _Sums:
    """Sums of s s^T, shared by all games, and of s (v(s) - v(0)), one for each game."""

    def __init__(self, num_patches: int):
        self.count = 0
        # On the CPU, in float64 on every device; the matrix is small.
        self.quadratic = torch.zeros(num_patches, num_patches, dtype=torch.float64)
        self.linear: Tensor | None = None

    def add(self, quadratic: Tensor, linear: Tensor, count: int) -> None:
        self.quadratic += quadratic
        self.linear = linear if self.linear is None else self.linear + linear
        self.count += count

    def keep(self, kept: Tensor) -> None:
        if self.linear is not None:
            self.linear = self.linear[kept.to(self.linear.device)]


class _Regression(Rounds):
    def __init__(
        self,
        num_patches: int,
        batch_size: int,
        variance_batches: int,
        paired: bool,
        exact_matrix: bool,
        generator: torch.Generator,
    ):
        self._num_patches = num_patches
        self._batch_size = batch_size
        self._group_size = batch_size * variance_batches
        self._paired = paired
        self._expected = expected_matrix(num_patches) if exact_matrix and num_patches > 1 else None
        self._generator = generator
        self._all = _Sums(num_patches)
        self._group = _Sums(num_patches)
        self._groups = RunningMoments()
        self.method = "KernelSHAP" + (", paired" if paired else "")
        self.method += ", exact matrix" if exact_matrix else ""

    def draw(self, room: int) -> Bool[Tensor, "coalitions patches"] | None:
        number = min(self._batch_size, room)
        number -= number % 2 if self._paired else 0
        if number < 1:
            return None
        return sample_coalitions(
            1, self._num_patches, number, paired=self._paired, generator=self._generator
        )[0]

    def add(
        self,
        coalitions: Bool[Tensor, "coalitions patches"],
        gains: Float[Tensor, "batch coalitions classes"],
        total: Float[Tensor, "batch classes"],
    ) -> bool:
        design = coalitions.to(device="cpu", dtype=torch.float64)
        quadratic = design.T @ design
        linear = coalitions.T.to(gains) @ gains
        for sums in (self._all, self._group):
            sums.add(quadratic, linear, len(coalitions))
        if self._group.count < self._group_size:
            return False
        self._groups.add(self._solve(self._group, total)[:, None])
        self._group = _Sums(self._num_patches)
        return self._groups.count >= MIN_GROUPS

    def estimate(self, total: Float[Tensor, "batch classes"]) -> tuple[Tensor, Tensor]:
        values = self._solve(self._all, total)
        if self._groups.count < MIN_GROUPS:
            return values, torch.full_like(values, torch.nan)
        variance = self._groups.variance() * (self._group_size / self._all.count)
        return values, variance.sqrt()

    def keep(self, kept: Bool[Tensor, " batch"]) -> None:
        self._all.keep(kept)
        self._group.keep(kept)
        self._groups.keep(kept)

    def _solve(self, sums: _Sums, total: Tensor) -> Tensor:
        matrix = sums.quadratic / max(sums.count, 1)
        if self._expected is not None:
            matrix = self._expected
        rank = int(torch.linalg.matrix_rank(matrix, hermitian=True))
        if sums.linear is None or rank < self._num_patches:
            raise EstimationError(
                f"the regression on {sums.count} coalitions is singular (rank {rank}, expected "
                f"{self._num_patches}, the number of players). Ask for more coalitions: at least "
                f"{10 * self._num_patches}, in max_coalitions (num_coalitions), and leave "
                "variance_batches=None."
            )
        inverse = torch.linalg.inv(matrix).to(total)
        free = inverse @ (sums.linear / sums.count)
        direction = inverse.sum(dim=1)
        excess = (free.sum(dim=1) - total) / direction.sum()
        return free - direction[:, None] * excess[:, None]


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator
