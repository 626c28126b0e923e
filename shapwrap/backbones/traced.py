"""Models of unknown structure, read while they run: the last map, and what the classifier reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures
from shapwrap.backbones.base import Backbone, FeatureMap, Normalization
from shapwrap.backbones.classifiers import comes_last, is_linear
from shapwrap.backbones.layout import described
from shapwrap.backbones.places import Place, patches_at, places_in
from shapwrap.backbones.pooled_children import IMAGENET_NORMALIZATION, is_torchvision
from shapwrap.backbones.recording import Recording, all_trainable, recording, replaced_output
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.tower_whole import TowerWhole
from shapwrap.backbones.whole_model import WholeModel, main_output
from shapwrap.errors import UnsupportedBackboneError


class Traced(Backbone):
    """What tracing finds; names of modules are kept, so that replaced ones are found."""

    _features: str = ""
    _grid: str = ""
    _start: int = 0
    _classifier: str = ""
    _unused: Sequence[nn.Parameter] = ()
    _dropout: float = 0.0

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
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} returned {described(output)}; expected logits "
                "[B, K]. Pass features= (a module name, or a function of the images) and head=."
            )
        places = places_in(record, (images.shape[-2], images.shape[-1]))
        if not places:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} makes no map [B, D, h, w]; expected one that its "
                "head reads. Pass features= (a module name, or a function of the images that "
                "returns a map, or patch tokens [B, N, D])."
            )
        self._classifier = self._find_classifier(record, names, images, output)
        # Without a linear layer that makes so many numbers, a model may as well be an encoder.
        stated = getattr(self.model, "num_classes", None) == output.shape[1]
        classifies = stated or any(_makes(module, record, output) for module in record.order)
        self.gives_logits = not self._classifier and classifies
        place = self._choose(record, places, images, output)
        self._features, self._grid = names[place.module], names[place.grid_of]
        self._start = place.start
        self._unused = self._find_unused(images)
        self._dropout = self._find_dropout(record)

    def _find_classifier(
        self, record: Recording, names: dict[nn.Module, str], images: Images, output: Tensor
    ) -> str:
        linear = [module for module in record.order if is_linear(module)]
        if not linear or record.order.count(linear[-1]) > 1:
            return ""
        hidden = record.inputs[linear[-1]]
        pooled = hidden.ndim == 2 or hidden.shape[-2:] == (1, 1)
        return (
            names[linear[-1]]
            if pooled and comes_last(linear[-1], self.model, images, output)
            else ""
        )

    def _find_unused(self, images: Images) -> list[nn.Parameter]:
        """Parameters without influence on features or output: auxiliary heads of training."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            return []
        with torch.enable_grad():
            (features, _), output = self.run(images)
            total = features.sum() + output.sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        read = {id(p) for classifier in self.classifiers() for p in classifier.parameters()}
        pairs = zip(parameters, found, strict=True)
        return [p for p, gradient in pairs if gradient is None and id(p) not in read]

    def _find_dropout(self, record: Recording) -> float:
        """Rate of the dropout that runs right before the classifier."""
        for classifier in self.classifiers():
            before = record.order[: record.order.index(classifier)][-1:]
            if before and isinstance(before[0], nn.Dropout):
                return before[0].p
        return 0.0

    def _choose(
        self, record: Recording, places: list[Place], images: Images, output: Tensor
    ) -> Place:
        """The last place; layers within a module come before it, so ties go to the outermost."""
        return places[-1]

    def run(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The patches, and what stands for the image: the classifier's input, or the output."""
        features, grid_of = map(self.model.get_submodule, (self._features, self._grid))
        with recording([features, grid_of, *self.classifiers()]) as record:
            output = self.model(images)
        place = Place(features, grid_of, self._start)
        for classifier in self.classifiers():
            return patches_at(record, place), record.inputs[classifier].flatten(1)
        # In train mode, models with auxiliary heads return their logits as one of several fields.
        return patches_at(record, place), main_output(output)

    def classifiers(self) -> Sequence[nn.Module]:
        """The linear layer that makes the logits, if there is one."""
        return [self.model.get_submodule(self._classifier)] if self._classifier else []

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those of layers that run in training alone (auxiliary heads)."""
        return list(self._unused)

    def normalization(self) -> Normalization | None:
        """ImageNet's statistics for torchvision's own models."""
        return IMAGENET_NORMALIZATION if is_torchvision(self.model) else None


def _makes(module: nn.Module, record: Recording, output: Tensor) -> bool:
    """Whether a linear layer of any kind makes one number for each that the model returns."""
    made = record.outputs[module]
    return isinstance(module, nn.Linear) and made.shape == output.shape


class TracedMean(Traced):
    """The classifier, or the output itself, reads the mean of a map; found by comparing numbers."""

    family = "mean of a traced map"

    def features(self, images: Images) -> FeatureMap:
        """The map whose mean is read."""
        return self.run(images)[0]

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """The mean as it is: the map holds class scores."""
        return pooled

    def classifier_dropout(self) -> float:
        """Rate of the dropout right before the classifier."""
        return self._dropout

    def _choose(
        self, record: Recording, places: list[Place], images: Images, output: Tensor
    ) -> Place:
        for classifier in self.classifiers():
            output = record.inputs[classifier].flatten(1)
        for place in reversed(places):
            mean = patches_at(record, place).features.mean(dim=1)
            close = mean.shape == output.shape and torch.allclose(
                mean, output, rtol=1e-4, atol=1e-5
            )
            if close and self._reads_mean(record, place, images):
                return place
        raise UnsupportedBackboneError(
            f"no map of {type(self.model).__name__} has the mean that its classifier reads"
        )

    def _reads_mean(self, record: Recording, place: Place, images: Images) -> bool:
        """Whether random features in that place have their mean read, and no weights lie between.

        An untrained norm or a layer of zeros would pass a comparison of the features as they are.
        """
        made = record.outputs[place.module]
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(made.shape, generator=generator) * 3).to(made)
        with torch.enable_grad(), all_trainable(self.model) as parameters:
            # Not a leaf: the model may change it in place.
            drawn = drawn.requires_grad_() * 1
            try:
                with (
                    replaced_output(place.module, lambda _: drawn),
                    recording(self.classifiers()) as again,
                ):
                    output = self.model(images)
            except RuntimeError:
                return False
            for classifier in self.classifiers():
                output = again.inputs[classifier].flatten(1)
            between = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        as_drawn = Recording()
        as_drawn.outputs = {**record.outputs, place.module: drawn}
        mean = patches_at(as_drawn, place).features.mean(dim=1)
        same = mean.shape == output.shape and torch.allclose(mean, output, rtol=1e-4, atol=1e-4)
        return same and all(gradient is None for gradient in between)


class TracedWhole(Traced, WholeModel):
    """Any model that makes a map somewhere and returns logits."""

    family = "traced map, head kept whole"

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The last patch features, and what stands for the whole image."""
        return self.run(images)


register_backbone(TracedMean, Preference.TRACED_MEAN)
register_backbone(TracedWhole, Preference.TRACED)
