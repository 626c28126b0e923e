"""timm models with a feature map: convolutional, windowed, hybrid, and any token model."""

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images, PatchFeatures, PatchMask, PooledFeatures, PreLogits
from shapwrap.backbones.attention_pooling_2d import MapPooling
from shapwrap.backbones.base import FeatureMap
from shapwrap.backbones.layout import grid_of_tokens, is_channels_last, patches_of_map
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_family import TimmFamily
from shapwrap.errors import UnsupportedBackboneError


class TimmMaps(TimmFamily):
    """Any timm model whose `forward_features` returns one map: NCHW, NHWC or tokens."""

    family = "timm feature map"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the model has timm's public methods and says how many features it has."""
        return super().recognises(model) and hasattr(model, "num_features")

    def features(self, images: Images) -> FeatureMap:
        """Patch features, row by row, whatever the layout of the map.

        Raises:
            UnsupportedBackboneError: The model returns its class tokens alone.
        """
        patches, grid = self._patches(images, None)
        if patches.shape[1] == 1 and self._layout == "tokens":
            raise UnsupportedBackboneError(
                f"forward_features of {type(self.trunk).__name__} returned one feature vector for "
                "the whole image; expected one for each patch."
            )
        return FeatureMap(patches, grid)

    def _patches(self, images: Images, present: PatchMask | None) -> FeatureMap:
        feature_map = self._map(images)
        if feature_map.ndim == 3:
            patches = feature_map[:, self._num_prefix() :]
            return FeatureMap(patches, self._token_grid(images, patches.shape[1]))
        patches, grid = patches_of_map(feature_map, channels_last=self._channels_last(feature_map))
        if present is None:
            present = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        pooling = self._map_pooling()
        return FeatureMap(pooling.features(patches, present, grid) if pooling else patches, grid)

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """Input of the classifier and output of the model."""
        hidden, output = super().original(images)
        if pooling := self._map_pooling():
            # The projection runs on every token, of which the first alone is read.
            hidden = hidden[:, : pooling.layer.embed_dim]
        return hidden, output

    def masked_features(self, images: Images, present: PatchMask) -> PatchFeatures:
        """Patch features of masked images; attention pooling weighs the present patches alone."""
        return self._patches(images, present).features

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The layers between pooling and classifier: none after attention pooling of a map."""
        return self.project(pooled) if self._map_pooling() else super().pre_logits(pooled)

    def _map_pooling(self) -> MapPooling | None:
        head = getattr(self.trunk, "head", None)
        if head is None or not MapPooling.recognises(head):
            return None
        return MapPooling(head)

    def mean_of_map(self, feature_map: Tensor) -> PooledFeatures:
        """Mean over the patches, in the layout of the last map that was made."""
        if feature_map.ndim == 3:
            return feature_map[:, self._num_prefix() :].mean(dim=1)
        return feature_map.mean(dim=(1, 2) if self._layout == "channels last" else (2, 3))

    def constant_map(self, pooled: PooledFeatures) -> Tensor:
        """A 1 x 1 map, or a token sequence whose tokens are all equal."""
        layout = self._layout
        if layout == "tokens":
            return pooled[:, None].expand(-1, self._num_prefix() + 1, -1)
        return pooled[:, None, None, :] if layout == "channels last" else pooled[:, :, None, None]

    def ignores_patches(self, images: Images) -> bool:
        """Whether noise on the patch tokens leaves the head's output as it is."""
        feature_map = self._map(images)
        if feature_map.ndim != 3 or self._num_prefix() == 0:
            return False
        noisy = feature_map.clone()
        noisy[:, self._num_prefix() :] = noisy[:, self._num_prefix() :].flip(1) * -2 + 1
        return torch.equal(
            self.head_before_classifier(feature_map), self.head_before_classifier(noisy)
        )

    _layout: str = "channels first"

    def _map(self, images: Images) -> Tensor:
        feature_map = self.trunk.forward_features(images)
        if not isinstance(feature_map, Tensor) or feature_map.ndim not in (3, 4):
            came = (
                f"shape {tuple(feature_map.shape)}"
                if isinstance(feature_map, Tensor)
                else type(feature_map).__name__
            )
            raise UnsupportedBackboneError(
                f"forward_features of {type(self.trunk).__name__} returned {came}; expected one "
                "map [B, D, h, w], [B, h, w, D] or [B, tokens, D]. A backbone with several maps "
                "has no single patch grid."
            )
        if feature_map.ndim == 3:
            self._layout = "tokens"
        else:
            last = self._channels_last(feature_map)
            self._layout = "channels last" if last else "channels first"
        return feature_map

    def _channels_last(self, feature_map: Tensor) -> bool:
        return is_channels_last(self.trunk, feature_map)

    def _num_prefix(self) -> int:
        return int(getattr(self.trunk, "num_prefix_tokens", 0))

    def _token_grid(self, images: Images, num_patches: int) -> Grid:
        height, width = images.shape[-2:]
        embedding = getattr(self.trunk, "patch_embed", None)
        stated = getattr(embedding, "dynamic_feat_size", None)
        if callable(stated):
            rows, columns = stated((height, width))  # pyright: ignore[reportGeneralTypeIssues]
            if rows * columns == num_patches:
                return rows, columns
        # Later stages halve both sides, so their grid has the aspect ratio of the image.
        return grid_of_tokens(num_patches, (height, width), type(self.trunk).__name__)


register_backbone(TimmMaps, Preference.MAP)
