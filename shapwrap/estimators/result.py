"""What an estimator says: values, how sure it is of them, and what it took."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ShapleyEstimate:
    """Shapley values of a batch of games; float64 where the device has it.

    The class axis is missing where the values of the games have none.
    """

    values: Float[Tensor, "batch patches *classes"]
    """phi; the sum over patches is `grand - empty` up to rounding."""
    standard_errors: Float[Tensor, "batch patches *classes"]
    """Of the values; NaN where too few coalitions were drawn to tell, 0 for enumeration."""
    empty: Float[Tensor, "batch *classes"]
    """v of nobody."""
    grand: Float[Tensor, "batch *classes"]
    """v of everybody."""
    ratio: Float[Tensor, " batch"]
    """Largest standard error over the range of the values, in the worst class; NaN for unknown."""
    num_coalitions: Int[Tensor, " batch"]
    """Coalitions evaluated for each game, those of nobody and everybody not counted."""
    converged: Bool[Tensor, " batch"]
    """Whether `ratio` came below `threshold`."""
    threshold: float | None
    """None if the number of coalitions was fixed."""
    method: str
    """Which estimator, with its options."""

    def efficiency_gap(self) -> Float[Tensor, "batch *classes"]:
        """|sum of values - (v of everybody - v of nobody)|: rounding error."""
        return (self.values.sum(dim=1) - (self.grand - self.empty)).abs()

    def forecast(self, threshold: float) -> Float[Tensor, " batch"]:
        """Coalitions that it would take to bring the ratio down to a threshold.

        Standard errors shrink with the root of the number of coalitions.
        """
        return self.num_coalitions * (self.ratio / threshold).square().clamp(min=1.0)


def without_class_axis(estimate: ShapleyEstimate) -> ShapleyEstimate:
    """The same, for games whose values had no class axis."""
    return ShapleyEstimate(
        values=estimate.values[..., 0],
        standard_errors=estimate.standard_errors[..., 0],
        empty=estimate.empty[..., 0],
        grand=estimate.grand[..., 0],
        ratio=estimate.ratio,
        num_coalitions=estimate.num_coalitions,
        converged=estimate.converged,
        threshold=estimate.threshold,
        method=estimate.method,
    )


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
