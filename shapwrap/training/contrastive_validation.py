"""Contrastive loss, retrieval within batches, and skill, on validation data."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shapwrap.audit import residuals
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.contrastive_objective import ContrastiveObjective, Features
from shapwrap.training.fresh_coalitions import fresh_coalitions
from shapwrap.training.validation import averaged


@torch.no_grad()
def validate_contrastive(
    model: nn.Module,
    clip: ShapleyCLIP | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    config: ContrastiveConfig,
    *,
    split: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Means over all images, in eval mode; a batch is compared within itself, over all processes.

    Args:
        model: The wrapped model, as accelerate prepared it.
        clip: The same model, bare; None for a plain model, which has no game.
        batches: Images and token ids, where the model lies.
        accelerator: Gathers what processes find.
        config: Loss, coalitions and seed.
        split: Whether accelerate split the batches among processes, and fills up the last one.
        autocast: The precision of the encoders.

    Raises:
        TrainingError: There is no batch.
    """
    generator = torch.Generator().manual_seed(config.seed + 1 + accelerator.process_index)
    # Only the loader knows which rows of its last batch were seen before.
    gather: Any = accelerator.gather_for_metrics if split else accelerator.gather
    objective = ContrastiveObjective(config)
    rows: list[Tensor] = []
    with evaluation_mode(model.modules()):
        for images, texts in batches:
            coalitions = None
            if clip is not None:
                coalitions = fresh_coalitions(
                    clip, images, config.validation_coalitions, config.distribution, generator
                )
            with autocast():
                played = {} if coalitions is None else {"coalitions": coalitions, "paired": True}
                output = model(images, texts, **played)
            own = Features.of(output)
            whole = own._replace(images=gather(own.images), texts=gather(own.texts))
            found = [_of_batch(objective, whole)]
            if coalitions is not None:
                game = output.for_texts(whole.texts)
                found.append(gather(torch.stack(residuals(game, coalitions), dim=1)))
            rows.append(torch.cat(found, dim=1).cpu().double())
    names = ["contrastive_loss", "image_to_text_r1", "text_to_image_r1"]
    if clip is not None:
        names += ["residual", "trivial_residual"]
    return averaged(rows, names, "(images, token ids)")


def _of_batch(objective: ContrastiveObjective, features: Features) -> Tensor:
    """Loss of the batch, and whether each image finds its text and each text its image, [B, 3]."""
    loss = objective.contrastive(features)
    similarity = features.images @ features.texts.T
    own = torch.arange(len(similarity), device=similarity.device)
    hits = (similarity.argmax(dim=1) == own, similarity.argmax(dim=0) == own)
    return torch.stack((loss.expand(len(own)), *(hit.to(loss.dtype) for hit in hits)), dim=1)
