"""Models whose children run one after another around one global pooling, as torchvision's do."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone, FeatureMap, Normalization
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.errors import UnsupportedBackboneError

IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The statistics of all of torchvision's own classification weights."""


def is_torchvision(model: nn.Module) -> bool:
    """Whether the class comes from torchvision's model zoo."""
    return type(model).__module__.startswith("torchvision.models")


class PooledChildren(Backbone):
    """Children before an adaptive average pooling encode, children after it classify.

    Holds for torchvision's ResNet, ConvNeXt, EfficientNet, RegNet, MobileNetV3 and Swin, and for
    any module built that way. That the children run in their order is proved at wrap time, by
    comparing with the model's own logits.
    """

    family = "children around a global pooling"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether one direct child is an adaptive average pooling to 1 x 1, with layers after."""
        return _pool_index(model) is not None

    def features(self, images: Images) -> FeatureMap:
        """The input of the pooling."""
        feature_map: Tensor = images
        for child in self._split()[0]:
            feature_map = child(feature_map)
        if feature_map.ndim != 4:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} pools a tensor of shape {tuple(feature_map.shape)}; "
                "expected a map [B, D, h, w]."
            )
        grid = (feature_map.shape[2], feature_map.shape[3])
        return FeatureMap(rearrange(feature_map, "b d h w -> b (h w) d"), grid)

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """All layers after the pooling but the classifier."""
        hidden: Tensor = pooled[:, :, None, None]
        for layer in self._head_layers()[:-1]:
            if isinstance(layer, nn.Linear):
                hidden = hidden.flatten(1)
            hidden = layer(hidden)
        return hidden.flatten(1)

    def classifiers(self) -> Sequence[nn.Module]:
        """The last layer."""
        return [m for m in self._head_layers()[-1:] if not isinstance(m, nn.Identity)]

    def classifier_dropout(self) -> float:
        """Rate of the dropout just before the classifier."""
        before = self._head_layers()[-2:-1]
        return before[0].p if before and isinstance(before[0], nn.Dropout) else 0.0

    def normalization(self) -> Normalization | None:
        """ImageNet's statistics for torchvision's own models."""
        return IMAGENET_NORMALIZATION if is_torchvision(self.model) else None

    def _split(self) -> tuple[list[nn.Module], list[nn.Module]]:
        layers = _layers(self.model)
        pool = _pool_index(self.model)
        return layers[:pool], layers[pool:][1:]

    def _head_layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for child in self._split()[1]:
            layers.extend(child.children() if isinstance(child, nn.Sequential) else [child])
        return layers


def _pool_index(model: nn.Module) -> int | None:
    layers = _layers(model)
    pools = [index for index, layer in enumerate(layers[:-1]) if _is_global_pool(layer)]
    return pools[-1] if pools else None


def _layers(model: nn.Module) -> list[nn.Module]:
    """Children in order; lists of layers, and the sequence that holds the pooling, opened."""
    layers: list[nn.Module] = []
    for child in model.children():
        holds_pool = isinstance(child, nn.Sequential) and any(map(_is_global_pool, child))
        opened = isinstance(child, nn.ModuleList) or holds_pool
        layers.extend(child.children() if opened else [child])
    return layers


def _is_global_pool(layer: nn.Module) -> bool:
    return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


register_backbone(PooledChildren, Preference.CHILDREN)
