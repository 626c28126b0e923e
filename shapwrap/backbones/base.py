"""What the rest of the package needs to know about a model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images, PatchFeatures, PooledFeatures, PreLogits


class FeatureMap(NamedTuple):
    """Features of every patch, row by row, and the grid that they form."""

    features: PatchFeatures
    grid: Grid


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone(ABC):
    """One family of models, seen as encoder, pooling and head.

    Every adapter calls the model's own modules; it holds no weights and leaves no hooks behind.
    """

    family: ClassVar[str]
    """What this adapter handles, in words for reports and errors."""

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the model has the parts that this adapter uses. Names of models play no role."""

    @abstractmethod
    def features(self, images: Images) -> FeatureMap:
        """Patch features of the whole image: the input of the pretrained pooling."""

    @abstractmethod
    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """What the pretrained head makes of one pooled feature, just before its classifier."""

    @abstractmethod
    def classifiers(self) -> Sequence[nn.Module]:
        """The pretrained classifiers, whose outputs are averaged; empty if there is none."""

    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model was built for."""

    @abstractmethod
    def ignores_patches(self, images: Images) -> bool:
        """Whether the pretrained head never reads the patch features (a class-token head)."""

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """Input of the classifier and output of the model, from the model's own forward pass.

        A model without a classifier returns the same tensor twice.
        """
        inputs: list[Tensor] = []
        handles = [
            classifier.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            for classifier in self.classifiers()
        ]
        try:
            output = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        hidden = (
            torch.stack([given.flatten(1) for given in inputs]).mean(dim=0) if inputs else output
        )
        return hidden, output

    def classifier_dropout(self) -> float:
        """Dropout rate on the input of the classifier."""
        return 0.0

    def normalization(self) -> Normalization | None:
        """Pixel statistics of the pretrained weights, if the model tells."""
        return None

    def class_names(self) -> list[str] | None:
        """Names of the classes, if the model tells."""
        return None

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that nothing reads once the model is wrapped."""
        return []

    @property
    def parameter(self) -> Tensor:
        """Any parameter: where the model lies and in which precision."""
        return next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))

    def in_channels(self) -> int:
        """Channels of the images, read off the first convolution."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
        return 3
