"""What one training step minimises, as named terms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap.errors import TrainingError
from shapwrap.losses import shapley_loss
from shapwrap.training.config import TrainerConfig
from shapwrap.values.game import masked_logits
from shapwrap.values.output import ShapleyOutput

TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, K] and targets to a scalar."""


@dataclass(frozen=True)
class Terms:
    """The terms of the loss; `total` is what is minimised."""

    total: Float[Tensor, ""]
    task: Float[Tensor, ""]
    shapley: Float[Tensor, ""]
    masked_task: Float[Tensor, ""]

    def named(self) -> dict[str, Float[Tensor, ""]]:
        """All terms, as a training record names them."""
        return {
            "loss": self.total,
            "task_loss": self.task,
            "shapley_loss": self.shapley,
            "masked_task_loss": self.masked_task,
        }


class Objective:
    """Task loss + lambda * Shapley loss (Eq. 14) + optional task loss of the masked branch.

    Args:
        config: Weights of the terms.
        task_loss: Loss of clean and masked logits; cross-entropy by default.
        has_baseline: Whether the model has logits for nobody, which v(s) leaves out.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task_loss: TaskLoss | None = None,
        *,
        has_baseline: bool = False,
    ):
        self.config = config
        self.has_baseline = has_baseline
        self._task_loss = task_loss

    @property
    def needs_coalitions(self) -> bool:
        """Whether any term reads the masked branch; without one, training is plain fine-tuning."""
        return self.config.shapley_weight != 0 or self.config.masked_cross_entropy > 0

    def plain(self, logits: Tensor, targets: Tensor) -> Terms:
        """The task loss alone."""
        task = self._loss(logits, targets, self.config.label_smoothing)
        return Terms(task, task, torch.zeros_like(task), torch.zeros_like(task))

    def __call__(
        self,
        output: ShapleyOutput,
        targets: Tensor,
        shapley_weight: float | Tensor,
        masked_targets: Float[Tensor, "batch coalitions classes"] | None = None,
    ) -> Terms:
        """All terms of one batch.

        Args:
            output: Of both branches.
            targets: Class indices [B], or probabilities [B, K].
            shapley_weight: Lambda, in 1 / logit^2.
            masked_targets: Of the coalitions; `targets` for all coalitions of an image if None.
        """
        task = self._loss(output.logits, targets, self.config.label_smoothing)
        shapley = shapley_loss(output)
        masked_task = torch.zeros_like(task)
        if self.config.masked_cross_entropy > 0:
            masked = masked_logits(output) if self.has_baseline else output.values
            if masked_targets is None:
                asked = targets.repeat_interleave(masked.shape[1], dim=0)
            else:
                asked = masked_targets.flatten(0, 1)
            masked_task = self._loss(masked.flatten(0, 1), asked, 0.0)
        total = task + shapley_weight * shapley + self.config.masked_cross_entropy * masked_task
        return Terms(total, task, shapley, masked_task)

    def _loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        if self._task_loss is not None:
            return self._task_loss(logits, targets)
        return cross_entropy(logits, targets, label_smoothing)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy.

    Raises:
        TrainingError: Labels that the model has no class for.
    """
    try:
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    except IndexError as error:
        raise TrainingError(
            f"labels do not fit the {logits.shape[1]} classes of the model ({error}); expected "
            f"0 to {logits.shape[1] - 1}. Wrap with num_classes= for another number."
        ) from error
