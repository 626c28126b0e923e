"""Draw, evaluate, add up, look: what every estimator that samples does, until it may stop."""

import warnings
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapwrap.errors import ArgumentError
from shapwrap.estimators.convergence import ConvergenceWarning, convergence_ratio
from shapwrap.estimators.games import OpenGames, Value
from shapwrap.estimators.result import ShapleyEstimate, without_class_axis


class Rounds(ABC):
    """Running sums of one estimator over the coalitions seen so far."""

    method: str
    """As in the result."""

    @abstractmethod
    def draw(self, room: int) -> Bool[Tensor, "coalitions patches"] | None:
        """The next coalitions, at most `room`; None if that is too few."""

    @abstractmethod
    def add(
        self,
        coalitions: Bool[Tensor, "coalitions patches"],
        gains: Float[Tensor, "batch coalitions classes"],
        total: Float[Tensor, "batch classes"],
    ) -> bool:
        """Take in v(s) - v(nobody); whether convergence may be looked at now."""

    @abstractmethod
    def estimate(self, total: Float[Tensor, "batch classes"]) -> tuple[Tensor, Tensor]:
        """Values and standard errors, [b, N, K] each, of what was added so far.

        Raises:
            EstimationError: Too few coalitions.
        """

    @abstractmethod
    def keep(self, kept: Bool[Tensor, " batch"]) -> None:
        """Forget the games that are done."""


def run(
    value: Value,
    batch: int,
    num_patches: int,
    rounds: Rounds,
    *,
    threshold: float | None,
    max_coalitions: int,
) -> ShapleyEstimate:
    """Play the games until each has converged, or its coalitions are used up.

    A game is finished at its own convergence, so its result does not depend on the others.

    Raises:
        ArgumentError: A threshold that is not positive, or no coalitions.
    """
    if threshold is not None and not threshold > 0:
        raise ArgumentError(
            f"threshold is {threshold}; expected a positive number, or None for a fixed number of "
            "coalitions."
        )
    if max_coalitions < 1:
        raise ArgumentError(f"max_coalitions is {max_coalitions}; expected at least 1.")
    games = OpenGames(value, batch, num_patches)
    empty, total = games.empty, games.grand - games.empty
    scale = torch.maximum(games.empty.abs(), games.grand.abs())
    values = total[:, None].repeat(1, num_patches, 1)
    errors = torch.zeros_like(values)
    ratio = values.new_zeros(batch)
    used_by = torch.zeros(batch, dtype=torch.long)
    used = 0
    while len(games.rows) and num_patches > 1:
        rows = games.rows.to(values.device)
        coalitions = rounds.draw(max_coalitions - used)
        if coalitions is not None:
            found = games(coalitions)
            scale[rows] = torch.maximum(scale[rows], found.abs().amax(dim=1))
            may_look = rounds.add(coalitions, found - empty[rows, None], total[rows])
            used += len(coalitions)
            if threshold is None or not may_look:
                continue
        now, now_errors = rounds.estimate(total[rows])
        now_ratio = convergence_ratio(now, now_errors, scale[rows], games.eps)
        done = torch.ones_like(now_ratio, dtype=torch.bool)
        if coalitions is not None and threshold is not None:
            done = now_ratio < threshold
        finished = rows[done]
        values[finished], errors[finished] = now[done], now_errors[done]
        ratio[finished] = now_ratio[done]
        used_by[finished.to(used_by.device)] = used
        if done.any():
            rounds.keep(~done)
            games.keep(~done)
    converged = ratio < threshold if threshold is not None else torch.zeros_like(ratio).bool()
    made = ShapleyEstimate(
        values=values,
        standard_errors=errors,
        empty=empty,
        grand=games.grand,
        ratio=ratio,
        num_coalitions=used_by.to(values.device),
        converged=converged,
        threshold=threshold,
        method=rounds.method,
    )
    if threshold is not None and not converged.all():
        _warn(made, threshold, max_coalitions)
    return made if games.has_classes else without_class_axis(made)


def _warn(made: ShapleyEstimate, threshold: float, max_coalitions: int) -> None:
    missed = ~made.converged
    ratios = made.ratio[missed]
    if torch.isnan(ratios).any():
        reached = "unknown, for want of coalitions to measure it on"
        advice = f"Raise max_coalitions well above {max_coalitions}"
    else:
        needed = made.forecast(threshold)[missed].max()
        reached = f"{float(ratios.max()):.3g}"
        advice = f"Raise max_coalitions to about {float(needed):.2g}"
    warnings.warn(
        f"{made.method}: {int(missed.sum())} of {len(missed)} games have not converged after "
        f"{max_coalitions} coalitions; the largest ratio of standard error to range is {reached}, "
        f"expected below {threshold:g}. {advice}, or raise the threshold.",
        ConvergenceWarning,
        stacklevel=4,
    )
