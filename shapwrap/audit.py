"""How far an explanation can be trusted, measured on coalitions it has never seen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import CoalitionValues, Images
from shapwrap.coalitions.sampling import Distribution, sample_coalitions
from shapwrap.errors import ArgumentError
from shapwrap.images import check_finite
from shapwrap.values.game import spread_evenly, squared_error, total_of_pairs
from shapwrap.values.output import ShapleyOutput


@dataclass(frozen=True)
class Audit:
    """How well s . phi(x) predicts v(s), per image, over all classes."""

    residual: Float[Tensor, " batch"]
    """Mean of (v(s) - s . phi)^2 over coalitions and classes, in squared logits."""
    trivial_residual: Float[Tensor, " batch"]
    """The same for an even spread of the logits, (|s| / N) v(1), in squared logits."""
    num_coalitions: int
    """Coalitions an image."""

    @property
    def skill(self) -> Float[Tensor, " batch"]:
        """1 - residual / trivial residual: 1 is perfect, 0 no better than an even spread.

        NaN where an even spread is itself perfect, as for a head that is all zero.
        """
        return 1 - self.residual / self.trivial_residual

    @property
    def overall_skill(self) -> float:
        """Skill of all images together, their residuals added up before the division."""
        return float(1 - self.residual.sum() / self.trivial_residual.sum())

    def __str__(self) -> str:
        """One line."""
        return (
            f"skill {self.overall_skill:.3f}, residual {float(self.residual.mean()):.3g} logit^2 "
            f"({len(self.residual)} images, {self.num_coalitions} coalitions each)"
        )


def residuals(output: ShapleyOutput, coalitions: Tensor) -> tuple[Tensor, Tensor]:
    """Residual and trivial residual of each image, [B] each, in squared logits.

    The coalitions must be complement pairs.
    """
    explained: CoalitionValues = output.estimates
    trivial = spread_evenly(total_of_pairs(explained)[:, 0], coalitions)
    return (
        squared_error(output.values, explained).mean(dim=(1, 2)),
        squared_error(output.values, trivial).mean(dim=(1, 2)),
    )


def audit(
    evaluate: Callable[[Images, Tensor], ShapleyOutput],
    images: Images,
    num_patches: int,
    *,
    num_coalitions: int,
    distribution: Distribution | str,
    generator: torch.Generator | None,
    chunk_size: int,
) -> Audit:
    """Residual and skill on fresh complement pairs.

    Raises:
        ArgumentError: An odd or non-positive number of coalitions, or a chunk below 2.
        ImageError: Pixels that are not finite.
    """
    check_finite(images)
    if num_coalitions < 2 or num_coalitions % 2:
        raise ArgumentError(
            f"num_coalitions is {num_coalitions}; expected an even number, at least 2."
        )
    if chunk_size < 2:
        raise ArgumentError(f"chunk_size is {chunk_size}; expected at least 2 (one pair).")
    generator = generator or torch.Generator().manual_seed(0)
    batch = images.shape[0]
    # In float32: not every device has float64, and the terms are of one size.
    total = torch.zeros(2, batch, device=images.device)
    done = 0
    while done < num_coalitions:
        step = min(chunk_size // 2 * 2, num_coalitions - done)
        coalitions = sample_coalitions(
            batch, num_patches, step, distribution=distribution, generator=generator
        ).to(images.device)
        pair: tuple[Tensor, Tensor] = residuals(evaluate(images, coalitions), coalitions)
        total += torch.stack(pair).float() * step
        done += step
    residual, trivial = total / num_coalitions
    return Audit(residual, trivial, num_coalitions)
