"""The two stages of training, on the loop that all training shares; needs the `train` extra."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.explainers.trained.config import TrainedConfig
from shapwrap.explainers.trained.data import images_like, images_of
from shapwrap.explainers.trained.links import linked
from shapwrap.explainers.trained.masks import sample_kernel, sample_uniform_sizes
from shapwrap.explainers.trained.objectives import explainer_losses, surrogate_loss
from shapwrap.explainers.trained.surrogate import Surrogate
from shapwrap.training import engine
from shapwrap.training.config import LoopConfig
from shapwrap.training.loop import Loop
from shapwrap.training.position import Position


class _MaskedImages(Loop):
    """A stage: images of one shape, labels unread."""

    def __init__(
        self,
        module: nn.Module,
        data: Iterable[Any],
        like: Images,
        *,
        config: TrainedConfig,
        stage: LoopConfig,
    ):
        super().__init__(module, data, config=stage)
        self._like = like[:0]
        self._method = config

    def _unpack(self, batch: Any) -> Tensor:
        return images_like(self._like, images_of(self._moved(batch)))


class SurrogateStage(_MaskedImages):
    """Fits a surrogate on masked images to the original model on clean ones.

    Args:
        surrogate: Trained in place.
        original: Clean images to logits, without gradient, where the images lie.
        data: Batches of images, or of images and labels.
        like: Images of the shape and the precision to come.
        config: Settings, with a surrogate stage.
        stage: That stage.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        original: Callable[[Images], Tensor],
        data: Iterable[Any],
        like: Images,
        *,
        config: TrainedConfig,
        stage: LoopConfig,
    ):
        self._num_patches = surrogate.grid[0] * surrogate.grid[1]
        self._original = original
        super().__init__(surrogate, data, like, config=config, stage=stage)

    def _terms(self, batch: Images, position: Position) -> dict[str, Tensor]:
        coalitions = sample_uniform_sizes(
            len(batch),
            self._num_patches,
            self._method.surrogate_masks,
            generator=position.coalitions,
        ).to(batch.device, non_blocking=True)
        with engine.autocast(self.accelerator, self._settings):
            with torch.no_grad():
                targets = self._original(batch)
            logits = self.model(batch, coalitions)
        return {"loss": surrogate_loss(logits, targets)}


class ExplainerStage(_MaskedImages):
    """Fits a network to the values of a surrogate, which is not trained.

    Args:
        network: Images to raw patch values; trained in place.
        surrogate: Where the images lie.
        data: Batches of images, or of images and labels.
        like: Images of the shape and the precision to come.
        config: Settings.
        chunk_size: Masked images that go through the surrogate at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        surrogate: Surrogate,
        data: Iterable[Any],
        like: Images,
        *,
        config: TrainedConfig,
        chunk_size: int,
    ):
        super().__init__(network, data, like, config=config, stage=config.explainer)
        self._surrogate = surrogate.to(self.accelerator.device)
        self._chunk_size = chunk_size

    def _frozen(self) -> list[nn.Module]:
        """None: this network learns its statistics from clean images."""
        return []

    def _terms(self, batch: Images, position: Position) -> dict[str, Tensor]:
        method, grid = self._method, self._surrogate.grid
        coalitions = sample_kernel(
            len(batch),
            grid[0] * grid[1],
            method.num_masks,
            distribution=method.distribution,
            paired=method.paired,
            generator=position.coalitions,
        ).to(batch.device, non_blocking=True)
        with engine.autocast(self.accelerator, self._settings):
            empty, full = self._surrogate.ends(batch, chunk_size=self._chunk_size)
            values = self._surrogate.evaluate(
                batch, coalitions, paired=method.paired, chunk_size=self._chunk_size
            )
            raw = self.model(batch)
        regression, efficiency = explainer_losses(
            raw,
            linked(empty, method.link),
            linked(full, method.link),
            coalitions,
            linked(values, method.link),
        )
        return {
            "loss": regression + method.efficiency_weight * efficiency,
            "regression_loss": regression,
            "efficiency_loss": efficiency,
        }
