"""What the rest of the package needs to know about a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap._types import (
    Coalitions,
    Grid,
    Images,
    PatchEmbeddings,
    PatchFeatures,
    PatchMask,
    PooledFeatures,
    PreLogits,
)
from shapwrap.images import first_weight
from shapwrap.masking.batch_norm import clean_statistics, evaluation_mode
from shapwrap.masking.pixels import zero_absent_pixels
from shapwrap.masking.pooling import present_means

Embedding = Callable[[PatchFeatures], PatchEmbeddings]
"""Done to the features of each patch alone."""


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

    gives_logits: bool = False
    """Whether the features stand for class scores, so that no classifier comes after."""

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the model has the parts that this adapter uses. Names of models play no role."""

    def prepare(self, images: Images) -> None:  # noqa: B027
        """Look at the model with these images, once, before anything else is asked.

        Raises:
            ShapwrapError: This adapter does not fit the model after all.
        """

    @abstractmethod
    def features(self, images: Images) -> FeatureMap:
        """Patch features of the whole image: the input of the pretrained pooling."""

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """What the pretrained head makes of one pooled feature, just before its classifier."""
        return pooled

    def read_by_head(self, pooled: PooledFeatures) -> Float[Tensor, "items read"]:
        """The part of pooled features that the head reads: by default all of it."""
        return pooled

    def project(self, hidden: Tensor) -> Tensor:
        """The last, affine layers of `pre_logits`; by default none.

        A readout may treat them apart from the layers before.
        """
        return hidden

    @abstractmethod
    def classifiers(self) -> Sequence[nn.Module]:
        """The pretrained classifiers, whose outputs are averaged; empty if there is none."""

    def class_scores(self, pooled: PooledFeatures) -> Float[Tensor, "items classes"]:
        """Logits of one pooled feature, where the classifier is more than one linear layer."""
        hidden = self.pre_logits(pooled)
        scores = [classifier(hidden) for classifier in self.classifiers()]
        return torch.stack(scores).mean(dim=0)

    def masked_features(self, images: Images, present: PatchMask) -> PatchFeatures:
        """Patch features of images whose absent patches are zeroed already.

        Only those of present patches are read; a head that weighs patches against each other
        does so among the present ones.
        """
        return self.features(images).features

    def covered(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """Height and width over which the patches lie, from the upper left corner: the image."""
        return size

    def image_size(self) -> tuple[int, int]:
        """Height and width that the model was built for; 224 x 224 where it does not tell."""
        return 224, 224

    def ignores_patches(self, images: Images) -> bool:
        """Whether the pretrained head never reads the patch features (a class-token head)."""
        return False

    def zero_masked_means(
        self,
        images: Images,
        coalitions: Coalitions,
        grid: Grid,
        embed: Embedding | None = None,
    ) -> Float[Tensor, "batch coalitions pooled"]:
        """Mean feature over the patches of each coalition, the pixels of the others zeroed.

        Args:
            images: Normalised pixels.
            coalitions: True where a patch is present.
            grid: Of patches.
            embed: What is done to the features of each patch before the mean.
        """
        covered = self.covered((images.shape[-2], images.shape[-1]), grid)
        masked = zero_absent_pixels(images, coalitions, grid, covered)
        flat = coalitions.flatten(0, 1)
        # Masked images neither enter the batch statistics nor are measured by those of a batch.
        with clean_statistics(self.model):
            features = self.masked_features(masked, flat)
            features = features if embed is None else embed(features)
        return present_means(features, flat[:, None]).unflatten(0, coalitions.shape[:2])[:, :, 0]

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """Input of the classifier and output of the model, from the model's own forward pass.

        A model without a classifier, or whose classifiers read features of several widths,
        returns its output twice.
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
        inputs = [given.flatten(1) for given in inputs]
        if not inputs or any(given.shape != inputs[0].shape for given in inputs):
            return output, output
        return torch.stack(inputs).mean(dim=0), output

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
        """A weight: where the model lies, and in which precision it takes images."""
        weight = first_weight(self.model)
        return torch.zeros(()) if weight is None else weight

    def in_channels(self, size: tuple[int, int] | None = None) -> int:
        """Channels of the images, read off the first layer that runs on them.

        Args:
            size: Of images that the model takes; by default those it was built for.
        """
        if self._channels is None:
            self._channels = self._find_channels(size or self.image_size())
        return self._channels

    def _find_channels(self, size: tuple[int, int]) -> int:
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None or first.in_channels == 3:
            return 3
        # Some models transform the pixels before their first convolution.
        images = torch.zeros(1, first.in_channels, *size).to(self.parameter)
        try:
            with torch.no_grad(), evaluation_mode(self.model.modules()):
                self.model(images)
        except (RuntimeError, AssertionError, ValueError):
            return 3
        return first.in_channels

    _channels: int | None = None
