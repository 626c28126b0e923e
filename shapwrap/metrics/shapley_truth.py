"""Shapley truth: a model's own Shapley values, converged, to compare explanations with."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.coalitions.exact import MAX_PLAYERS
from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.estimators import (
    ShapleyEstimate,
    enumerate_coalitions,
    kernel_shap,
    permutation_sampling,
)
from shapwrap.explainers.explained_model import Model
from shapwrap.metrics.protocol import versions
from shapwrap.values.patch_game import PatchGames
from shapwrap.wrapper import ShapleyWrapper

METHODS = ("auto", "exact", "kernel", "permutation")
GAMES_AT_A_TIME = 8
"""Bounds the running sums, [games, players, classes] in float64; coalitions fill the device."""


@runtime_checkable
class Games(Protocol):
    """A batch of games over a grid of players: `PatchGames`, or the pixel games of any model."""

    @property
    def players(self) -> Grid:
        """Rows and columns."""
        ...

    @property
    def removal(self) -> str:
        """What it means that a player is absent."""
        ...

    def __len__(self) -> int:
        """B."""
        ...

    def __call__(self, coalitions: Tensor) -> Tensor:
        """Values [B, S, K] of coalitions [B, S, players]."""
        ...

    def select(self, rows: Tensor) -> "Games":
        """Some of them."""
        ...


@dataclass(frozen=True)
class ShapleyTruth:
    """Shapley values of a batch of images, all classes, with everything that makes them comparable.

    Reusable: compute it once, `save` it, and compare any number of explanations with it.
    """

    estimate: ShapleyEstimate
    """Values [B, players, K] in logits, standard errors, ratio, number of coalitions."""
    players: Grid
    """Rows and columns of players."""
    removal: str
    """What it means that a player is absent."""
    cross_check: Float[Tensor, " batch"] | None = None
    """Root mean square, over players and classes, of the difference to permutation sampling in
    units of its standard error: about 1 where the two agree. None if it was not asked for."""
    seed: int | None = None
    """Of the generator; None if nothing was drawn."""
    versions: str = ""
    """Of shapwrap and torch, when it was made."""

    @property
    def values(self) -> Float[Tensor, "batch players classes"]:
        """phi*."""
        return self.estimate.values

    @property
    def total(self) -> Float[Tensor, "batch classes"]:
        """V of everybody minus v of nobody: what the values sum to."""
        return self.estimate.grand - self.estimate.empty

    def protocol(self) -> dict[str, object]:
        """How the truth was made, for a table's caption."""
        estimate = self.estimate
        return {
            "game": f"logits, absent players by {self.removal}",
            "players": self.players,
            "estimator": estimate.method,
            "threshold": estimate.threshold,
            "largest ratio": float(estimate.ratio.max()),
            "converged": f"{int(estimate.converged.sum())} of {len(estimate.converged)}",
            "coalitions": int(estimate.num_coalitions.max()),
            "largest efficiency gap": float(estimate.efficiency_gap().max()),
            "seed": self.seed,
            "versions": self.versions,
        }

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        estimate = {f.name: getattr(self.estimate, f.name) for f in fields(self.estimate)}
        torch.save(
            {
                "estimate": {
                    k: v.cpu() if isinstance(v, Tensor) else v for k, v in estimate.items()
                },
                "players": tuple(self.players),
                "removal": self.removal,
                "cross_check": None if self.cross_check is None else self.cross_check.cpu(),
                "seed": self.seed,
                "versions": self.versions,
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> "ShapleyTruth":
        """Read it from a file that `save` wrote, on the CPU."""
        read = torch.load(path, map_location="cpu", weights_only=True)
        return cls(**(read | {"estimate": ShapleyEstimate(**read["estimate"])}))


def shapley_truth(
    wrapped: Model,
    images: Tensor,
    *,
    players: Grid | None = None,
    method: str = "auto",
    threshold: float = 0.01,
    max_coalitions: int = 131_072,
    batch_size: int = 256,
    cross_check: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int = 64,
) -> ShapleyTruth:
    """The Shapley values of the game that a wrapped model itself plays, v(s) in logits.

    All images get the same coalitions and each stops at its own convergence, so that an image's
    truth does not depend on its batch.

    Args:
        wrapped: A `ShapleyWrapper`, evaluated in eval mode and left as it was.
        images: Float [B, C, H, W].
        players: Rows and columns of blocks of patches that come and go together; by default every
            patch is a player. With at most 16 the truth is exact.
        method: "exact" enumerates, "kernel" is paired KernelSHAP, "permutation" antithetic
            permutation sampling; "auto" is exact for at most 16 players, else kernel.
        threshold: Of convergence: largest standard error over the range of the values, in the worst
            class.
        max_coalitions: Upper limit an image.
        batch_size: Coalitions an image between two looks at the running sums; even.
        cross_check: Also estimate with permutation sampling, to the same threshold and limit, and
            report how far the two differ. Not for the exact truth, nor for method="permutation".
        generator: Source of randomness; a new one with seed 0 if None.
        chunk_size: Masked images that run at a time.

    Raises:
        BackboneTypeError: The model is not wrapped, so it plays no game of its own.
        ImageTypeError: Images that are not floating point.
        ImageError: A shape or size that the model refuses, or pixels that are not finite.
        ArgumentError: An unknown method, or a number out of range.

    Warns:
        ConvergenceWarning: The threshold was not reached.
        UserWarning: The two estimators of a cross-check disagree.
    """
    wrapped = checked_wrapper(wrapped)
    wrapped.patches_of(images)
    games = PatchGames(
        wrapped, images, wrapped.grid_of(images), players, chunk_size, wrapped._wrapping.masking
    )
    truth = truth_of(
        games,
        method=method,
        threshold=threshold,
        max_coalitions=max_coalitions,
        batch_size=batch_size,
        cross_check=cross_check,
        generator=generator,
    )
    # The games are centred; the class that a model predicts is that of its logits.
    estimate, baseline = truth.estimate, wrapped.baseline
    estimate = replace(estimate, empty=estimate.empty + baseline, grand=estimate.grand + baseline)
    return replace(truth, estimate=estimate)


def checked_wrapper(model: Model) -> ShapleyWrapper:
    """The model, if it is wrapped.

    Raises:
        BackboneTypeError: It is not.
    """
    if not isinstance(model, ShapleyWrapper):
        raise BackboneTypeError(
            f"wrapped is {type(model).__name__}; expected a ShapleyWrapper: a plain model plays no "
            "game without a way to remove patches. Use ShapleyWrapper(model), or truth_of with "
            "games of your own."
        )
    return model


def truth_of(
    games: Games,
    *,
    method: str = "auto",
    threshold: float = 0.01,
    max_coalitions: int = 131_072,
    batch_size: int = 256,
    cross_check: bool = False,
    generator: torch.Generator | None = None,
) -> ShapleyTruth:
    """The Shapley values of any games; arguments, errors and warnings as in `shapley_truth`."""
    if method not in METHODS:
        raise ArgumentError(f"method is {method!r}; expected one of {METHODS}.")
    num_players = games.players[0] * games.players[1]
    if method == "auto":
        method = "exact" if num_players <= MAX_PLAYERS else "kernel"
    if cross_check and method != "kernel":
        raise ArgumentError(
            f"cross_check=True with method {method!r}; it compares KernelSHAP with permutation "
            'sampling. Pass method="kernel".'
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seeds = torch.randint(2**62, (2,), generator=generator, device=generator.device).tolist()

    def estimate(method: str, seed: int) -> ShapleyEstimate:
        parts = []
        for rows in torch.arange(len(games)).split(GAMES_AT_A_TIME):
            part = games.select(rows)
            if method == "exact":
                made = enumerate_coalitions(part, len(rows), num_players, batch_size=batch_size)
            else:
                made = _SAMPLERS[method](
                    part,
                    len(rows),
                    num_players,
                    threshold=threshold,
                    max_coalitions=max_coalitions,
                    batch_size=batch_size,
                    generator=torch.Generator().manual_seed(seed),
                )
            parts.append(made)
        return _joined(parts)

    made = estimate(method, seeds[0])
    agreement = _disagreement(made, estimate("permutation", seeds[1])) if cross_check else None
    seed = None if method == "exact" else generator.initial_seed()
    return ShapleyTruth(made, games.players, games.removal, agreement, seed, versions())


_SAMPLERS: dict[str, Callable[..., ShapleyEstimate]] = {
    "kernel": kernel_shap,
    "permutation": permutation_sampling,
}


def _joined(parts: list[ShapleyEstimate]) -> ShapleyEstimate:
    tensors = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(ShapleyEstimate)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return replace(parts[0], **tensors)


def _disagreement(first: ShapleyEstimate, second: ShapleyEstimate) -> Tensor:
    variance = first.standard_errors.square() + second.standard_errors.square()
    squares = (first.values - second.values).square() / variance
    # Both without error and without difference: agreement, where 0 / 0 would say NaN.
    squares = squares.masked_fill(first.values == second.values, 0.0)
    apart = squares.mean(dim=(1, 2)).sqrt()
    if (apart > 3).any():
        warnings.warn(
            f"KernelSHAP and permutation sampling differ by {float(apart.max()):.1f} standard "
            "errors (root mean square), expected about 1: do not trust this truth. Look for a "
            "model that draws random numbers in eval mode, and run it in float32.",
            stacklevel=4,
        )
    return apart
