"""From one number an image to one number a data set, with its standard error."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Measured:
    """What a metric found for one model and one method."""

    images: dict[str, list[float]] = field(default_factory=dict)
    """One number an image, by name; NaN where it is not defined."""
    summary: dict[str, float] = field(default_factory=dict)
    """One number for all of them."""
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors of the summary over images."""
    undefined: dict[str, int] = field(default_factory=dict)
    """Images that a number does not count."""
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """`x`, `y` and the standard `error` of y, by name."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """Everything that was chosen."""

    def add_images(self, numbers: Mapping[str, Tensor]) -> None:
        """Take over per-image numbers [n], with their means and standard errors.

        An image without a number (NaN) is left out and counted.
        """
        for name, values in numbers.items():
            values = values.detach().double().cpu()
            kept = values[~values.isnan()]
            self.images[name] = values.tolist()
            self.undefined[name] = len(values) - len(kept)
            self.summary[name] = float(kept.mean()) if len(kept) else math.nan
            self.errors[name] = standard_error(kept)

    def add_curve(self, name: str, x: Tensor, y: Tensor) -> None:
        """Take over a curve an image, [n, points], as its mean and standard error."""
        y = y.detach().double().cpu()
        spread = y.std(dim=0) / len(y) ** 0.5 if len(y) > 1 else y[0] * math.nan
        points = {"x": x.detach().double().cpu(), "y": y.mean(dim=0), "error": spread}
        self.curves[name] = {part: numbers.tolist() for part, numbers in points.items()}


def standard_error(values: Tensor) -> float:
    """Of a mean; NaN below two values."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def jackknife_error(rows: Tensor, statistic: Callable[[Tensor], float]) -> float:
    """Standard error of a statistic of sums over images, by leaving out one image at a time.

    Args:
        rows: One row an image, [n, parts].
        statistic: From the sums over images, [parts], to a number.
    """
    rows = rows.double().cpu()
    count = len(rows)
    if count < 2:
        return math.nan
    total = rows.sum(dim=0)
    left_out = torch.tensor([statistic(total - row) for row in rows], dtype=torch.float64)
    return float(((left_out - left_out.mean()).square().sum() * (count - 1) / count).sqrt())
