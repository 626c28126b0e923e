"""Models of unknown structure, read while they run: the last map, and what the classifier reads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures
from shapwrap.backbones.base import Backbone, FeatureMap, Normalization
from shapwrap.backbones.classifiers import is_linear, reproduces
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.pooled_children import IMAGENET_NORMALIZATION, is_torchvision
from shapwrap.backbones.recording import Recording, recording
from shapwrap.backbones.tower_whole import TowerWhole
from shapwrap.backbones.whole_model import WholeModel, mean_output
from shapwrap.errors import UnsupportedBackboneError

MOST_PREFIX_TOKENS = 16
"""More tokens than that beside the patches are no class tokens and registers."""


class Place(NamedTuple):
    """Where patch features are: a map [B, D, h, w], or tokens [B, prefix + h w, D] made of one."""

    module: nn.Module
    grid_of: nn.Module
    num_prefix: int


class Traced(Backbone):
    """What tracing finds; names of modules are kept, so that replaced ones are found."""

    _features: str = ""
    _grid: str = ""
    _num_prefix: int = 0
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
        places = _places(record, (images.shape[-2], images.shape[-1]))
        if not places:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} makes no map [B, D, h, w]; expected one that its "
                "head reads. Pass features= (a module name, or a function of the images that "
                "returns a map, or patch tokens [B, N, D])."
            )
        self._classifier = self._find_classifier(record, names, output)
        # Without a linear layer at its end, a model may as well be an encoder.
        stated = getattr(self.model, "num_classes", None)
        self.gives_logits = not self._classifier and stated == output.shape[1]
        place = self._choose(record, places, output)
        self._features, self._grid = names[place.module], names[place.grid_of]
        self._num_prefix = place.num_prefix
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

    def _choose(self, record: Recording, places: list[Place], output: Tensor) -> Place:
        """The last place; layers within a module come before it, so ties go to the outermost."""
        return places[-1]

    def run(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The patches, and what stands for the image: the classifier's input, or the output."""
        features, grid_of = map(self.model.get_submodule, (self._features, self._grid))
        with recording([features, grid_of, *self.classifiers()]) as record:
            output = self.model(images)
        place = Place(features, grid_of, self._num_prefix)
        for classifier in self.classifiers():
            return _patches(record, place), record.inputs[classifier].flatten(1)
        # In train mode, models with auxiliary heads return their logits as one of several fields.
        return _patches(record, place), mean_output(getattr(output, "logits", output))

    def classifiers(self) -> Sequence[nn.Module]:
        """The linear layer that makes the logits, if there is one."""
        return [self.model.get_submodule(self._classifier)] if self._classifier else []

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those of layers that run in training alone (auxiliary heads)."""
        return list(self._unused)

    def normalization(self) -> Normalization | None:
        """ImageNet's statistics for torchvision's own models."""
        return IMAGENET_NORMALIZATION if is_torchvision(self.model) else None


def _places(record: Recording, size: tuple[int, int]) -> list[Place]:
    """Where patch features may be, in the order in which they were made."""
    places: list[Place] = []
    grid_of: nn.Module | None = None
    for module in dict.fromkeys(record.order):
        output = record.outputs[module]
        if _is_map(output, size):
            grid_of = module
            places.append(Place(module, module, 0))
        elif grid_of is not None and isinstance(output, Tensor) and output.ndim == 3:
            num_patches = record.outputs[grid_of].shape[-2:].numel()
            if 0 <= (num_prefix := output.shape[1] - num_patches) <= MOST_PREFIX_TOKENS:
                places.append(Place(module, grid_of, num_prefix))
    return places


def _patches(record: Recording, place: Place) -> FeatureMap:
    features = record.outputs[place.module]
    if place.module is place.grid_of:
        return patches_of_map(features)
    rows, columns = record.outputs[place.grid_of].shape[-2:]
    return FeatureMap(features[:, place.num_prefix :], (rows, columns))


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
        return self.run(images)[0]

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """The mean as it is: the map holds class scores."""
        return pooled

    def _choose(self, record: Recording, places: list[Place], output: Tensor) -> Place:
        for classifier in self.classifiers():
            output = record.inputs[classifier].flatten(1)
        for place in reversed(places):
            mean = _patches(record, place).features.mean(dim=1)
            if mean.shape == output.shape and torch.allclose(mean, output, rtol=1e-4, atol=1e-5):
                return place
        raise UnsupportedBackboneError(
            f"no map of {type(self.model).__name__} has the mean that its classifier reads"
        )


class TracedWhole(Traced, WholeModel):
    """Any model that makes a map somewhere and returns logits."""

    family = "traced map, head kept whole"

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The last patch features, and what stands for the whole image."""
        return self.run(images)
