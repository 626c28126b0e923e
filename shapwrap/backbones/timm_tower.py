"""Image towers that hold a timm model (`trunk`) and what projects its features (`head`)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shapwrap._types import Images, PreLogits
from shapwrap.backbones.attention_pooling_2d import MapPooling
from shapwrap.backbones.base import Normalization
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_family import TimmFamily
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_relpos import TimmRelPos
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tower_whole import pixel_statistics, size_of_tower
from shapwrap.backbones.whole_model import mean_output


class TimmTower(TimmFamily):
    """Built like open_clip's TimmModel. It has no classifier: its output is what a head reads."""

    @property
    def trunk(self) -> Any:
        """The timm model."""
        return self.model.trunk

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether there is a trunk that is a timm model, and a sequential head."""
        trunk, head = getattr(model, "trunk", None), getattr(model, "head", None)
        if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Sequential):
            return False
        return super().recognises(trunk)

    def classifiers(self) -> Sequence[nn.Module]:
        """None: what timm calls the classifier of the trunk makes the embedding."""
        return []

    def head_before_classifier(self, feature_map: Tensor) -> PreLogits:
        """The whole of timm's `forward_head`, then the head of the tower."""
        return self.model.head(mean_output(self.trunk.forward_head(feature_map)))

    def project(self, hidden: Tensor) -> Tensor:
        """What timm calls the classifier of the trunk, if any, and the head of the tower."""
        classifier = self.trunk.get_classifier()
        return self.model.head(classifier(hidden) if isinstance(classifier, nn.Module) else hidden)

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """The embedding, twice."""
        embedding = self.model(images)
        return embedding, embedding

    def classifier_dropout(self) -> float:
        """None: the trunk's comes before the projection."""
        return 0.0

    def image_size(self) -> tuple[int, int]:
        """The size that the tower states."""
        return size_of_tower(self.model) or super().image_size()

    def normalization(self) -> Normalization | None:
        """The statistics that the tower states; those of the trunk belong to other weights."""
        return pixel_statistics(self.model)


class TimmTowerTokens(TimmTower, TimmTokens):
    """The trunk is a token model."""

    family = "image tower, timm tokens"


class TimmTowerRelPos(TimmTower, TimmRelPos):
    """The trunk is a token model with a bias for each pair of places."""

    family = "image tower, timm tokens with relative positions"


class TimmTowerMaps(TimmTower, TimmMaps):
    """The trunk makes a feature map, which the trunk itself or the head of the tower pools."""

    family = "image tower, timm feature map"

    def project(self, hidden: Tensor) -> Tensor:
        """The layers of the tower's head after its attention pooling, or all of them."""
        pooling = self._tower_pooling()
        if pooling is None:
            return super().project(hidden)
        for layer in [pooling.layer.proj, *list(self.model.head)[1:]]:
            hidden = layer(hidden)
        return hidden

    def _map(self, images: Images) -> Tensor:
        if self._tower_pooling() is None:
            return super()._map(images)
        # The trunk's own head pools nothing here, but may still norm every place.
        return self.trunk(images)

    def _map_pooling(self) -> MapPooling | None:
        return self._tower_pooling() or super()._map_pooling()

    def _tower_pooling(self) -> MapPooling | None:
        first = next(iter(self.model.head), None)
        return MapPooling(first) if first is not None and MapPooling.recognises(first) else None


register_backbone(TimmTowerTokens, Preference.TOKENS)
register_backbone(TimmTowerRelPos, Preference.TOKENS)
register_backbone(TimmTowerMaps, Preference.MAP)
