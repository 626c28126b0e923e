"""Encoders that return a feature map, or patch tokens, and leave pooling and head to others."""

from collections.abc import Sequence

from torch import Tensor, nn

from shapwrap._types import Images, PreLogits
from shapwrap.backbones.base import Backbone, FeatureMap
from shapwrap.backbones.layout import is_channels_last, patches_of, patches_of_map
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.errors import UnsupportedBackboneError


class MapEncoder(Backbone):
    """Any model whose output is [B, D, h, w], [B, h, w, D] or patch tokens [B, N, D].

    Without pooling of its own, a head that is passed in reads the mean of the patches.
    """

    family = "encoder that returns patches"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Always: what a model returns shows when it runs."""
        return True

    def prepare(self, images: Images) -> None:
        """Runs the model once.

        Raises:
            UnsupportedBackboneError: It returns no patches.
        """
        output = self.model(images)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} returns no map of patches; expected [B, D, h, w], "
                "[B, h, w, D] or patch tokens [B, N, D]."
            )

    def features(self, images: Images) -> FeatureMap:
        """The output of the model."""
        output = self.model(images)
        if output.ndim == 4:
            return patches_of_map(output, channels_last=is_channels_last(self.model, output))
        size = (images.shape[-2], images.shape[-1])
        return patches_of(output, size, type(self.model).__name__)

    def classifiers(self) -> Sequence[nn.Module]:
        """None."""
        return []

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """The mean of the patches, twice: a head has nothing else to read."""
        pooled = self.features(images).features.mean(dim=1)
        return pooled, pooled

    def image_size(self) -> tuple[int, int]:
        """The size that the model, or its encoder, states."""
        for owner in (self.model, getattr(self.model, "encoder", None)):
            size = getattr(getattr(owner, "patch_embed", None), "img_size", None)
            if isinstance(size, tuple | list):
                return int(size[0]), int(size[1])
        stated = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size")
        return (int(stated[-2]), int(stated[-1])) if stated else super().image_size()


register_backbone(MapEncoder, Preference.ENCODER)
