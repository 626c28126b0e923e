"""CLIP's ModifiedResNet: a map that attention from its mean pools and projects."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images, PatchFeatures, PatchMask, PooledFeatures, PreLogits
from shapwrap.backbones.attention_pooling import Attention
from shapwrap.backbones.attention_pooling_2d import MapPooling
from shapwrap.backbones.base import Backbone, FeatureMap, Normalization
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.tower_whole import pixel_statistics, size_of_tower


class SeparateMapPooling(MapPooling):
    """CLIP's own AttentionPool2d: a projection each for queries, keys and values."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether the layer has the parts; that it pools as claimed is proved by its output."""
        parts = ("positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj", "num_heads")
        return all(hasattr(layer, part) for part in parts)

    def _attention(self, tokens: Tensor, grid: Grid) -> Attention:
        layer = self.layer
        tokens = tokens + layer.positional_embedding.to(tokens.dtype)
        query, key, value = (
            projection(given).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            for projection, given in (
                (layer.q_proj, tokens[:, :1]),
                (layer.k_proj, tokens),
                (layer.v_proj, tokens),
            )
        )
        return Attention(query[:, :, 0], key, value)


class OpenClipResNet(Backbone):
    """Stem, four levels and attention pooling, whose output, the embedding, a head reads."""

    family = "open_clip ResNet"

    model: Any

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("stem", "layer1", "layer2", "layer3", "layer4", "image_size")
        pooling = getattr(model, "attnpool", None)
        return (
            all(hasattr(model, part) for part in parts)
            and pooling is not None
            and SeparateMapPooling.recognises(pooling)
        )

    def features(self, images: Images) -> FeatureMap:
        """Contributions of the patches to the attention pooling."""
        patches, grid = self._patches(images)
        everyone = patches.new_ones(patches.shape[:2], dtype=torch.bool)
        return FeatureMap(self._pooling().features(patches, everyone, grid), grid)

    def masked_features(self, images: Images, present: PatchMask) -> PatchFeatures:
        """The same, query and softmax being those of the present patches alone."""
        patches, grid = self._patches(images)
        return self._pooling().features(patches, present, grid)

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The output projection of the pooling."""
        return self.model.attnpool.c_proj(pooled)

    def classifiers(self) -> Sequence[nn.Module]:
        """None: the output of a tower is what a head reads."""
        return []

    def ignores_patches(self, images: Images) -> bool:
        """Never: the pooling reads them."""
        return False

    def image_size(self) -> tuple[int, int]:
        """The size of the positional embedding."""
        return size_of_tower(self.model) or (224, 224)

    def normalization(self) -> Normalization | None:
        """The statistics that the tower states."""
        return pixel_statistics(self.model)

    def _patches(self, images: Images) -> FeatureMap:
        model = self.model
        feature_map = model.stem(images)
        for level in (model.layer1, model.layer2, model.layer3, model.layer4):
            feature_map = level(feature_map)
        return patches_of_map(feature_map)

    def _pooling(self) -> SeparateMapPooling:
        return SeparateMapPooling(self.model.attnpool)


register_backbone(OpenClipResNet, Preference.MAP)
