"""Losses since the last look at them, kept on the device so that no step waits for it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shapwrap.errors import TrainingError


class LossWindow:
    """Running sums of the terms of the loss.

    Args:
        mean_of_processes: Averages a tensor over processes, which all see the same means then, and
            stop together where one of them has a loss that is not finite.
    """

    def __init__(self, mean_of_processes: Callable[[Tensor], Tensor]) -> None:
        self._mean_of_processes = mean_of_processes
        self._sum: Tensor | None = None
        self._count = 0
        self._names: tuple[str, ...] = ()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count one batch in."""
        self._names = tuple(terms)
        values = torch.stack(tuple(terms.values())).detach()
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def check(self, step: int, weights: Iterable[Tensor] = ()) -> dict[str, float]:
        """Means since the last check; waits for the device.

        Args:
            step: For the message.
            weights: Looked at as well, before they are saved: a finite loss may have a gradient
                that is not, which only the next loss would show.

        Raises:
            TrainingError: A term or a weight is not finite.
        """
        found = self._means(step)
        learning = (weight for weight in weights if weight.requires_grad)
        whole = [_own_part(weight).isfinite().all() for weight in learning]
        if whole and self._mean_of_processes(torch.stack(whole).all().float()).item() < 1:
            raise TrainingError(
                f"weights are not finite after step {step}, though the losses were: a gradient was "
                "not. Lower learning_rate or shapley_weight, use bf16 instead of fp16, and look "
                "for functions without a gradient in task_loss. The newest checkpoint is from "
                "before."
            )
        return found

    def _means(self, step: int) -> dict[str, float]:
        if self._sum is None:
            return {}
        means: list[float] = self._mean_of_processes(self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        found: dict[str, float] = dict(zip(self._names, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise TrainingError(
                f"the loss is not finite at or just before step {step}: {found}; expected finite "
                "terms. Lower learning_rate or shapley_weight, use bf16 instead of fp16, and look "
                "for NaN in the images. The newest checkpoint is from before."
            )
        return found


def _own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight that FSDP2 splits."""
    split: Any = getattr(weight, "to_local", None)
    return weight.detach() if split is None else split().detach()
