"""Accuracy and skill on validation data, the same coalitions each time."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shapwrap.audit import residuals
from shapwrap.errors import TrainingError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.training.config import TrainerConfig
from shapwrap.training.fresh_coalitions import fresh_coalitions


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[Any],
    accelerator: Accelerator,
    config: TrainerConfig,
    *,
    split: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Accuracy, skill and residual over all images, in eval mode.

    Args:
        model: The wrapped model, as accelerate prepared it.
        batches: Images and labels, where the model lies.
        accelerator: Gathers what processes find.
        config: Coalitions and seed.
        split: Whether accelerate split the batches among processes.
        autocast: The precision of the encoder.

    Skill is 1 - E(v(s) - s . phi)^2 / E(v(s) - (|s| / N) v(1))^2 over fresh Shapley-kernel pairs.

    Raises:
        TrainingError: There is no batch.
    """
    generator = torch.Generator().manual_seed(config.seed + 1 + accelerator.process_index)
    rows: list[Tensor] = []
    with evaluation_mode(model.modules()):
        for images, targets in batches:
            coalitions = fresh_coalitions(
                accelerator.unwrap_model(model),
                images,
                config.validation_coalitions,
                config.distribution,
                generator,
            )
            with autocast():
                output = model(images, coalitions, paired=True)
            # Soft labels, as mixing augmentations make them, count as their largest.
            labels = targets.argmax(dim=1) if targets.ndim == 2 else targets
            correct = (output.logits.argmax(dim=1) == labels).to(output.logits.dtype)
            row = torch.stack((correct, *residuals(output, coalitions)), dim=1)
            # The last batch of a split loader is filled up with images seen before; only the
            # loader knows, and only where accelerate prepared it.
            gathered: Any = accelerator.gather_for_metrics(row) if split else row
            rows.append(gathered.cpu().double())
    return averaged(rows, ("accuracy", "residual", "trivial_residual"), "(images, labels)")


def averaged(rows: list[Tensor], names: Sequence[str], expected: str) -> dict[str, float]:
    """Means over all images by name, the skill where there are residuals, and `images`.

    Args:
        rows: One row an image, one number a name, by batch.
        names: Of the numbers.
        expected: What a batch is.

    Raises:
        TrainingError: There is no batch.
    """
    if not rows:
        raise TrainingError(f"the validation data has no batch; expected {expected}.")
    whole = torch.cat(rows)
    metrics: dict[str, float] = dict(zip(names, whole.mean(dim=0).tolist(), strict=True))
    if "residual" in metrics:
        residual, trivial = metrics["residual"], metrics["trivial_residual"]
        metrics["skill"] = 1 - residual / trivial if trivial > 0 else math.nan
    return metrics | {"images": float(len(whole))}
