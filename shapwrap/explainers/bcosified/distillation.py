"""The B-cosified tower learns the embeddings of the original; needs the `train` extra."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.explainers.bcosified.config import BcosifiedConfig
from shapwrap.explainers.bcosified.dynamic import set_b
from shapwrap.explainers.bcosified.losses import cosine_loss, cosines, siglip_loss
from shapwrap.explainers.bcosified.tower import BcosifiedTower
from shapwrap.explainers.trained.data import images_like, images_of
from shapwrap.explainers.trained.surrogate import precision_of
from shapwrap.training import engine
from shapwrap.training.checkpoint import checkpoints
from shapwrap.training.config import LoopConfig
from shapwrap.training.loop import Loop
from shapwrap.training.position import Position


class Distillation(Loop):
    """Fits a B-cosified tower to another tower on clean images; labels are not read.

    Pairs of the loss are those of one process.

    Args:
        student: Trained in place.
        teacher: The original, in eval mode; not changed, and copied where training runs elsewhere.
        data: Batches of images, or of images and labels.
        like: Images of the shape and the precision to come.
        config: Settings.
    """

    def __init__(
        self,
        student: BcosifiedTower,
        teacher: nn.Module,
        data: Iterable[Any],
        like: Images,
        *,
        config: BcosifiedConfig,
    ):
        super().__init__(student, data, config=config.distillation)
        self._teacher = _on(self.accelerator.device, teacher)
        self._like = like[:0]
        self._method = config

    def _unpack(self, batch: Any) -> Tensor:
        return images_like(self._like, images_of(self._moved(batch)))

    def _terms(self, batch: Images, position: Position) -> dict[str, Tensor]:
        method = self._method
        set_b(self.model, method.b_at(position.step, self.total_steps))
        with engine.autocast(self.accelerator, self._settings):
            with torch.no_grad():
                wanted = self._teacher(batch.to(precision_of(self._teacher)))
            found = self.model(batch)
        if method.loss == "cosine":
            loss = cosine_loss(found, wanted)
        else:
            loss = siglip_loss(found, wanted, scale=method.logit_scale, bias=method.logit_bias)
        return {"loss": loss, "cosine": cosines(found.detach(), wanted).diagonal().mean()}

    def _state_of_loss(self, position: Position) -> dict[str, float]:
        """B of the last step."""
        return {"b": self._method.b_at(position.step - 1, self.total_steps)}


def has_started(stage: LoopConfig) -> bool:
    """Whether there is a checkpoint from which training could go on."""
    return stage.output_dir is not None and bool(checkpoints(Path(stage.output_dir)))


def _on(device: torch.device, tower: nn.Module) -> nn.Module:
    lies = next(tower.parameters()).device
    return tower if lies == device else deepcopy(tower).to(device)
