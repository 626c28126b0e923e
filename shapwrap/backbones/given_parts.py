"""Models of one's own, whose features and head are passed in."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone, FeatureMap
from shapwrap.backbones.layout import described, patches_of
from shapwrap.backbones.recording import recording
from shapwrap.backbones.whole_model import WholeModel, main_output
from shapwrap.errors import ArgumentError, UnsupportedBackboneError

Features = str | Callable[[Images], Tensor]
HeadPart = str | Callable[[PooledFeatures], Tensor]


def given_parts(
    model: nn.Module, features: Features, head: HeadPart | None, *, new_head: bool
) -> Backbone:
    """The adapter for parts that a user passes: a head on their mean, or the model's own output.

    Args:
        model: The model.
        features: Name of the submodule whose output is the feature map, or a function of the
            images: a map [B, D, h, w], or patch tokens [B, N, D].
        head: Name of the submodule, or function, from pooled features [M, D] to logits [M, K].
        new_head: A layer that is none of the model's will read the pooled features.

    Raises:
        ArgumentError: A name that the model does not have.
    """
    names = [name for name, _ in model.named_modules()]
    for argument, part in (("features", features), ("head", head)):
        if isinstance(part, str) and part not in names:
            raise ArgumentError(
                f"{argument} is {part!r}; expected the name of a submodule of "
                f"{type(model).__name__}, such as {', '.join(names[1:6])}, or a function."
            )
    if head is None and not new_head:
        return GivenFeatures(model, features)
    return GivenParts(model, features, head)


class GivenParts(Backbone):
    """Features as given, and a head that reads their mean."""

    family = "features and head as given"

    def __init__(self, model: nn.Module, features: Features, head: HeadPart | None):
        super().__init__(model)
        self._features = features
        self._head = head

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Never: only what a user passes says what the parts are."""
        return False

    def features(self, images: Images) -> FeatureMap:
        """The features as given."""
        return _run(self.model, self._features, images)[0]

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The layers of a sequential head before its last."""
        for layer in self._layers()[:-1]:
            pooled = layer(pooled)
        return pooled

    def classifiers(self) -> Sequence[nn.Module]:
        """The last layer of the head, or all of it; nothing if another head comes."""
        return self._layers()[-1:]

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """The head as given."""
        for layer in self._layers():
            pooled = layer(pooled)
        return pooled

    def classifier_dropout(self) -> float:
        """Rate of a dropout right before the last layer of the head."""
        before = self._layers()[-2:-1]
        return before[0].p if before and isinstance(before[0], nn.Dropout) else 0.0

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """Logits of the model where it returns as many as the head, else of the parts."""
        pooled = self.features(images).features.mean(dim=1)
        hidden = self.pre_logits(pooled)
        if self._head is None:
            return hidden, hidden
        own, logits = main_output(self.model(images)), self.class_scores(pooled)
        same = isinstance(own, Tensor) and own.shape == logits.shape
        return hidden, own if same else logits

    def _layers(self) -> list[nn.Module]:
        if self._head is None:
            return []
        head = self.model.get_submodule(self._head) if isinstance(self._head, str) else None
        if isinstance(head, nn.Sequential):
            return list(head)
        return [head or _Function(self._head)]


class GivenFeatures(WholeModel):
    """Features as given; the logits are what the model returns."""

    family = "features as given, head kept whole"
    gives_logits = True

    def __init__(self, model: nn.Module, features: Features):
        super().__init__(model)
        self._features = features

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Never: only what a user passes says what the parts are."""
        return False

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The features as given, and the logits, from one pass where the features have a name."""
        patches, output = _run(self.model, self._features, images)
        output = main_output(self.model(images) if output is None else output)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} returned {described(output)}; expected "
                "logits [B, K]. Pass head= a function from pooled features to logits."
            )
        return patches, output

    def classifiers(self) -> Sequence[nn.Module]:
        """None that is known: the model returns logits."""
        return []

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """The output of the model, twice."""
        output = main_output(self.model(images))
        return output, output


class _Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, pooled: Tensor) -> Tensor:
        return self.function(pooled)


def _run(model: nn.Module, features: Features, images: Images) -> tuple[FeatureMap, Any]:
    """Patch features, and the model's output if it had to run."""
    size = (images.shape[-2], images.shape[-1])
    if not isinstance(features, str):
        return patches_of(features(images), size, "the function features="), None
    module = model.get_submodule(features)
    with recording([module]) as record:
        output = model(images)
    if module not in record.outputs:
        raise UnsupportedBackboneError(
            f"features={features!r} names a submodule that does not run in the forward pass of "
            f"{type(model).__name__}; expected one that does."
        )
    return patches_of(record.outputs[module], size, f"the submodule {features!r}"), output
