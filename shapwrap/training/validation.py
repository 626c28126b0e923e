"""Accuracy and skill on validation data, the same coalitions each time."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shapwrap.audit import residuals
from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.errors import TrainingError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.training.config import TrainerConfig


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Any], accelerator: Accelerator, config: TrainerConfig
) -> dict[str, float]:
    """Accuracy, skill and residual over all images, in eval mode.

    Skill is 1 - E(v(s) - s . phi)^2 / E(v(s) - (|s| / N) v(1))^2 over fresh Shapley-kernel pairs.

    Raises:
        TrainingError: There is no batch.
    """
    generator = torch.Generator().manual_seed(config.seed + 1 + accelerator.process_index)
    rows: list[Tensor] = []
    with evaluation_mode(model.modules()):
        for images, targets in batches:
            num_patches = accelerator.unwrap_model(model).patches_of(images)
            coalitions = sample_coalitions(
                len(images),
                num_patches,
                config.validation_coalitions,
                distribution=config.distribution,
                generator=generator,
            ).to(images.device)
            output = model(images, coalitions, paired=True)
            correct = (output.logits.argmax(dim=1) == targets).to(output.logits.dtype)
            row = torch.stack((correct, *residuals(output, coalitions)), dim=1)
            gathered: Any = accelerator.gather_for_metrics(row)
            rows.append(gathered.double().cpu())
    if not rows:
        raise TrainingError("the validation data has no batch; expected (images, labels) pairs.")
    accuracy, residual, trivial = torch.cat(rows).mean(dim=0).tolist()
    return {
        "accuracy": accuracy,
        "skill": 1 - residual / trivial if trivial > 0 else 0.0,
        "residual": residual,
        "trivial_residual": trivial,
        "images": float(sum(len(row) for row in rows)),
    }
