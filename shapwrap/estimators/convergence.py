"""When to stop: standard errors small against the range of the values."""

import torch
from jaxtyping import Float
from torch import Tensor


class ConvergenceWarning(UserWarning):
    """The estimate is rougher than was asked for."""


def convergence_ratio(
    values: Float[Tensor, "batch patches classes"],
    standard_errors: Float[Tensor, "batch patches classes"],
    scale: Float[Tensor, "batch classes"],
    eps: float,
) -> Float[Tensor, " batch"]:
    """Max over classes of max_i std_i / (max_i phi_i - min_i phi_i); NaN for unknown errors.

    Where both are rounding noise of the game (equal values without any variance), the ratio of
    a class counts as 0: nothing more can be learned about it.

    Args:
        values: phi.
        standard_errors: Of phi.
        scale: Largest |v| seen.
        eps: Of the dtype in which the game gives its values.

    References:
        Covert & Lee 2021, "Improving KernelSHAP".
    """
    largest = standard_errors.amax(dim=1)
    spread = values.amax(dim=1) - values.amin(dim=1)
    # The rounding of half precision is larger than most values; it may not pass for convergence.
    # In double precision the solution of the regression rounds more than the game does.
    noise = max(8 * min(eps, torch.finfo(torch.float32).eps), 1e-12) * scale
    settled = (largest <= noise) & (spread <= noise)
    return torch.where(settled, 0.0, largest / spread).amax(dim=1)


class RunningMoments:
    """Mean and variance of a stream of tensors, one for each open game (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Of all samples."""
        if self._mean is None:
            raise RuntimeError("no samples yet")
        return self._mean

    def add(self, samples: Float[Tensor, "batch samples patches classes"]) -> None:
        """Take in some samples of every game."""
        number = samples.shape[1]
        mean = samples.mean(dim=1)
        squares = (samples - mean[:, None]).square().sum(dim=1)
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = number, mean, squares
            return
        total = self.count + number
        shift = mean - self._mean
        self._mean = self._mean + shift * (number / total)
        self._squares = self._squares + squares + shift.square() * (self.count * number / total)
        self.count = total

    def variance(self) -> Tensor:
        """Unbiased, of one sample; NaN below two samples."""
        if self._squares is None:
            raise RuntimeError("no samples yet")
        if self.count < 2:
            return torch.full_like(self._squares, torch.nan)
        return self._squares / (self.count - 1)

    def keep(self, kept: Tensor) -> None:
        """Forget the games that are done."""
        if self._mean is not None and self._squares is not None:
            kept = kept.to(self._mean.device)
            self._mean, self._squares = self._mean[kept], self._squares[kept]
