"""Losses since the last look at them, kept on the device so that no step waits for it."""

import math

from torch import Tensor

from shapwrap.errors import TrainingError
from shapwrap.training.objective import Terms

NAMES = ("loss", "task_loss", "shapley_loss", "masked_task_loss")


class LossWindow:
    """Running sums of the terms of the loss."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, terms: Terms) -> None:
        """Count one batch in."""
        values = terms.detached()
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def check(self, step: int) -> dict[str, float]:
        """Means since the last check; waits for the device.

        Raises:
            TrainingError: A term is not finite.
        """
        if self._sum is None:
            return {}
        means: list[float] = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        found: dict[str, float] = dict(zip(NAMES, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise TrainingError(
                f"the loss is not finite at or just before step {step}: {found}; expected finite "
                "terms. Lower learning_rate or shapley_weight, use bf16 instead of fp16, and look "
                "for NaN in the images. The newest checkpoint is from before."
            )
        return found
