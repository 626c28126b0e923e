"""What all timm models share: `forward_features`, `forward_head`, `get_classifier`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone, Normalization
from shapwrap.backbones.classifiers import linear_part
from shapwrap.backbones.whole_model import mean_output


class TimmFamily(Backbone):
    """Head, classifier and meta-data of a timm model."""

    family = "timm"

    model: Any

    @property
    def trunk(self) -> Any:
        """The timm model itself, for models that hold one."""
        return self.model

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the model has timm's public methods."""
        methods = ("forward_features", "forward_head", "get_classifier")
        return all(callable(getattr(model, name, None)) for name in methods)

    def classifiers(self) -> Sequence[nn.Module]:
        """The pretrained classifiers; a distilled model has two."""
        found = self.trunk.get_classifier()
        modules = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
        real = [m for m in modules if m is not None and any(True for _ in m.parameters())]
        if self._around_classifier:
            return [self.trunk.get_submodule(self._around_classifier)]
        return [linear_part(module) for module in real]

    def prepare(self, images: Images) -> None:
        """Finds out whether `forward_head` stops right before the classifier that timm names.

        Some heads norm what the linear layer reads, and count the norm as part of the classifier.
        """
        self._around_classifier = ""
        classifiers = self.classifiers()
        names = {module: name for name, module in self.trunk.named_modules()}
        around = names.get(classifiers[0], "").rpartition(".")[0] if len(classifiers) == 1 else ""
        if around and linear_part(module := self.trunk.get_submodule(around)) is module:
            hidden, _ = self.original(images)
            found = self.head_before_classifier(self.trunk.forward_features(images))
            if found.shape == hidden.shape and not torch.allclose(found, hidden, rtol=1e-3):
                self._around_classifier = around

    _around_classifier: str = ""

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The pretrained head on feature maps that hold one vector everywhere."""
        return self.head_before_classifier(self.constant_map(pooled))

    def head_before_classifier(self, feature_map: Tensor) -> PreLogits:
        """Timm's `forward_head` without its classifier; of an encoder that has none, the mean."""
        try:
            pooled = self.trunk.forward_head(feature_map, pre_logits=True)
        except NotImplementedError:
            pooled = self.mean_of_map(feature_map)
        # A distilled model pools its two tokens apart and averages the two logits.
        return self.project(mean_output(pooled).flatten(1))

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """Timm's `forward_head`, with a classifier of whatever kind."""
        return mean_output(self.trunk.forward_head(self.constant_map(pooled)))

    def mean_of_map(self, feature_map: Tensor) -> PooledFeatures:
        """Mean over the patches of a feature map in the model's own layout."""
        raise NotImplementedError

    def constant_map(self, pooled: PooledFeatures) -> Tensor:
        """A feature map, in the model's own layout, that holds `pooled` at every place."""
        raise NotImplementedError

    def classifier_dropout(self) -> float:
        """Of `head_drop`, or timm's `drop_rate`, applied to the input of the classifier."""
        layer = getattr(self.trunk, "head_drop", None)
        if isinstance(layer, nn.Dropout):
            return layer.p
        return float(getattr(self.trunk, "drop_rate", 0.0) or 0.0)

    def image_size(self) -> tuple[int, int]:
        """The size of the patch embedding, else of the pretrained weights."""
        built_for = getattr(getattr(self.trunk, "patch_embed", None), "img_size", None)
        if built_for is not None:
            return int(built_for[0]), int(built_for[1])
        size = self._configuration().get("input_size") or (3, 224, 224)
        return int(size[-2]), int(size[-1])

    def normalization(self) -> Normalization | None:
        """Mean and standard deviation of the pretrained configuration."""
        configuration = self._configuration()
        mean, std = configuration.get("mean"), configuration.get("std")
        if mean is None or std is None or len(mean) != self.in_channels():
            return None
        return Normalization(tuple(mean), tuple(std))

    def class_names(self) -> list[str] | None:
        """ImageNet names, where the classifier has the classes of the pretrained weights."""
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        classifiers = self.classifiers()
        pretrained_classes = self._configuration().get("num_classes")
        if not classifiers or getattr(self.trunk, "num_classes", None) != pretrained_classes:
            return None
        subset = infer_imagenet_subset(self.trunk)
        if subset is None:
            return None
        names = ImageNetInfo(subset).label_descriptions()
        return [name.split(",")[0] for name in names]

    def _configuration(self) -> dict[str, Any]:
        return getattr(self.trunk, "pretrained_cfg", None) or {}
