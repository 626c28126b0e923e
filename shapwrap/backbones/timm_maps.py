"""timm models with a feature map: convolutional, windowed, hybrid, and any token model."""

import torch
from einops import rearrange
from torch import Tensor, nn

from shapwrap._types import Grid, Images, PooledFeatures
from shapwrap.backbones.base import FeatureMap
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
        """Patch features, row by row, whatever the layout of the map."""
        feature_map = self._map(images)
        if feature_map.ndim == 3:
            patches = feature_map[:, self._num_prefix() :]
            return FeatureMap(patches, self._token_grid(images, patches.shape[1]))
        if not self._channels_last(feature_map):
            feature_map = rearrange(feature_map, "b d h w -> b h w d")
        grid = (feature_map.shape[1], feature_map.shape[2])
        return FeatureMap(rearrange(feature_map, "b h w d -> b (h w) d"), grid)

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
        feature_map = self.model.forward_features(images)
        if not isinstance(feature_map, Tensor) or feature_map.ndim not in (3, 4):
            came = (
                f"shape {tuple(feature_map.shape)}"
                if isinstance(feature_map, Tensor)
                else type(feature_map).__name__
            )
            raise UnsupportedBackboneError(
                f"forward_features of {type(self.model).__name__} returned {came}; expected one "
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
        stated = getattr(self.model, "output_fmt", None)
        if stated is not None:
            return str(getattr(stated, "value", stated)).upper() == "NHWC"
        return (
            feature_map.shape[-1] == self.model.num_features
            and feature_map.shape[1] != self.model.num_features
        )

    def _num_prefix(self) -> int:
        return int(getattr(self.model, "num_prefix_tokens", 0))

    def _token_grid(self, images: Images, num_patches: int) -> Grid:
        height, width = images.shape[-2:]
        embedding = getattr(self.model, "patch_embed", None)
        stated = getattr(embedding, "dynamic_feat_size", None)
        if callable(stated):
            rows, columns = stated((height, width))  # pyright: ignore[reportGeneralTypeIssues]
            if rows * columns == num_patches:
                return rows, columns
        # Later stages halve both sides, so their grid has the aspect ratio of the image.
        for rows in range(1, num_patches + 1):
            columns = num_patches // rows
            if rows * columns == num_patches and rows * width == columns * height:
                return rows, columns
        raise UnsupportedBackboneError(
            f"{type(self.model).__name__} makes {num_patches} patches of {height} x {width} pixels "
            "and does not say how many rows; expected a patch_embed with dynamic_feat_size, or "
            "patches that form a grid of the image's aspect ratio."
        )
