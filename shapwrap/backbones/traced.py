"""Models of unknown structure, read while they run: the last map, and what the classifier reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone, FeatureMap, Normalization
from shapwrap.backbones.classifiers import is_linear, reproduces
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.pooled_children import IMAGENET_NORMALIZATION, is_torchvision
from shapwrap.backbones.recording import Recording, recording
from shapwrap.backbones.tower_whole import TowerWhole
from shapwrap.backbones.whole_model import WholeModel, mean_output
from shapwrap.errors import UnsupportedBackboneError


class Traced(Backbone):
    """What tracing finds; names of modules are kept, so that replaced ones are found."""

    _map: str = ""
    _classifier: str = ""
    _unused: Sequence[nn.Parameter] = ()

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Always: whether the parts are there shows when the model runs.

        But for image towers, whose last linear layer makes their embedding and is no classifier.
        """
        return not TowerWhole.recognises(model)

    def prepare(self, images: Images) -> None:
        """Runs the model once and finds the map that is read, and the classifier.

        Raises:
            UnsupportedBackboneError: The model returns no logits, or makes no map.
        """
        names = {module: name for name, module in self.model.named_modules()}
        with recording(list(names)) as record:
            output = self.model(images)
        if not isinstance(output, Tensor) or output.ndim != 2:
            came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} returned {came}; expected logits [B, K]. Pass "
                "features= (a module name, or a function of the images) and head=."
            )
        size = (images.shape[-2], images.shape[-1])
        maps = [m for m in record.order if _is_map(record.outputs[m], size)]
        if not maps:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} makes no map [B, D, h, w]; expected one that its "
                "head reads. Pass features= (a module name, or a function of the images that "
                "returns a map, or patch tokens [B, N, D])."
            )
        self._classifier = self._find_classifier(record, names, output)
        self._map = names[self._choose_map(record, maps, output)]
        ran = {id(p) for m in record.outputs for p in m.parameters(recurse=False)}
        self._unused = [p for p in self.model.parameters() if id(p) not in ran]

    def _find_classifier(
        self, record: Recording, names: dict[nn.Module, str], output: Tensor
    ) -> str:
        for module in reversed(record.order):
            if is_linear(module) and record.inputs[module].flatten(1).ndim == 2:
                hidden = record.inputs[module]
                pooled = hidden.ndim == 2 or hidden.shape[-2:] == (1, 1)
                if pooled and reproduces(module, hidden, output):
                    return names[module]
                return ""
        return ""

    def _choose_map(self, record: Recording, maps: list[nn.Module], output: Tensor) -> nn.Module:
        """The last map; layers within a module come before it, so ties go to the outermost."""
        return maps[-1]

    def run(self, images: Images) -> tuple[Tensor, Tensor]:
        """The map, and what stands for the whole image: the classifier's input, or the output."""
        modules = [self.model.get_submodule(self._map)]
        modules += [self.model.get_submodule(self._classifier)] if self._classifier else []
        with recording(modules) as record:
            output = self.model(images)
        if self._classifier:
            return record.outputs[modules[0]], record.inputs[modules[1]].flatten(1)
        # In train mode, models with auxiliary heads return their logits as one of several fields.
        return record.outputs[modules[0]], mean_output(getattr(output, "logits", output))

    def classifiers(self) -> Sequence[nn.Module]:
        """The linear layer that makes the logits; the model itself where there is none."""
        return [self.model.get_submodule(self._classifier) if self._classifier else self.model]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those of layers that run in training alone (auxiliary heads)."""
        return list(self._unused)

    def image_size(self) -> tuple[int, int]:
        """224 x 224, for which torchvision's models are built: such models do not tell."""
        return 224, 224

    def normalization(self) -> Normalization | None:
        """ImageNet's statistics for torchvision's own models."""
        return IMAGENET_NORMALIZATION if is_torchvision(self.model) else None

    def ignores_patches(self, images: Images) -> bool:
        """Never: that a head reads the map is proved by its numbers."""
        return False


def _is_map(output: object, size: tuple[int, int]) -> bool:
    """Whether an output is [B, D, h, w] with places that form the image, attention weights not."""
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
        return False
    (rows, columns), (height, width) = output.shape[-2:], size
    # A map of one place has been pooled already; borders may cost a row or a column.
    if rows * columns == 1 or abs(rows * width - columns * height) > max(height, width):
        return False
    weights = bool((output >= 0).all()) and bool(((output.sum(dim=-1) - 1).abs() < 1e-3).all())
    return not weights


class TracedMean(Traced):
    """The classifier, or the output itself, reads the mean of a map; found by comparing numbers."""

    family = "mean of a traced map"

    def features(self, images: Images) -> FeatureMap:
        """The map whose mean is read."""
        return patches_of_map(self.run(images)[0])

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The mean as it is."""
        return pooled

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """The mean as it is: the map holds class scores."""
        return pooled

    def _choose_map(self, record: Recording, maps: list[nn.Module], output: Tensor) -> nn.Module:
        if self._classifier:
            output = record.inputs[self.model.get_submodule(self._classifier)].flatten(1)
        for module in reversed(maps):
            mean = record.outputs[module].mean(dim=(2, 3))
            if mean.shape == output.shape and torch.allclose(mean, output, rtol=1e-4, atol=1e-5):
                return module
        raise UnsupportedBackboneError(
            f"no map of {type(self.model).__name__} has the mean that its classifier reads"
        )


class TracedWhole(Traced, WholeModel):
    """Any model that makes a map somewhere and returns logits."""

    family = "traced map, head kept whole"

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The last map, and what stands for the whole image."""
        feature_map, output = self.run(images)
        return patches_of_map(feature_map), output
