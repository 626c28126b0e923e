"""The last layer: from what a patch says to what it is worth for each class."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import PatchScores
from shapwrap.backbones.classifiers import is_linear
from shapwrap.errors import ReadoutError
from shapwrap.masking.pooling import compute_dtype


class Classifier(ABC):
    """An affine map from scores [..., D'] to classes [..., K], looked up on the model at each call.

    Replacing the model's classifier therefore keeps working.
    """

    def __init__(self, layers: Callable[[], Sequence[nn.Module]]):
        self._layers = layers

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """K."""

    @property
    @abstractmethod
    def num_features(self) -> int:
        """D', the width of what the classifier reads."""

    @abstractmethod
    def __call__(self, scores: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes classes"]:
        """Class scores, bias included."""

    @abstractmethod
    def of_target(
        self,
        scores: PatchScores,
        target: Int[Tensor, " batch"],
        *,
        contrast: bool,
    ) -> Float[Tensor, "batch patches"]:
        """Scores of one class an image; with `contrast`, minus the mean over classes."""

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases, for a learning rate of their own."""
        return [parameter for layer in self._layers() for parameter in layer.parameters()]


class LinearClassifier(Classifier):
    """One linear layer, or the average of several (distilled models), in float32."""

    def __init__(self, layers: Callable[[], Sequence[nn.Module]]):
        super().__init__(layers)
        self.weight_and_bias()

    def weight_and_bias(
        self, target: Tensor | None = None
    ) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
        """Weight and bias, of all classes or of the rows that `target` picks.

        Raises:
            ReadoutError: A layer is neither nn.Linear nor a 1 x 1 nn.Conv2d.
        """
        layers = self._layers()
        weights, biases = zip(*(_linear_form(layer) for layer in layers), strict=True)
        if target is not None:
            weights = [weight[target] for weight in weights]
            biases = [bias[target] for bias in biases]
        weight, bias = sum(weights) / len(layers), sum(biases) / len(layers)
        return weight, bias  # pyright: ignore[reportReturnType]

    @property
    def num_classes(self) -> int:
        """K."""
        return _linear_form(self._layers()[0])[0].shape[0]

    @property
    def num_features(self) -> int:
        """D', the width of what the classifier reads."""
        return _linear_form(self._layers()[0])[0].shape[1]

    def __call__(self, scores: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes classes"]:
        """Class scores, bias included."""
        weight, bias = self.weight_and_bias()
        return functional.linear(scores, weight.to(scores.dtype), bias.to(scores.dtype))

    def of_target(
        self,
        scores: PatchScores,
        target: Int[Tensor, " batch"],
        *,
        contrast: bool,
    ) -> Float[Tensor, "batch patches"]:
        """Scores of one class an image, from one row of the weights."""
        weight, bias = self.weight_and_bias(target)
        if contrast:
            all_weights, all_biases = self.weight_and_bias()
            weight, bias = weight - all_weights.mean(dim=0), bias - all_biases.mean()
        weight, bias = weight.to(scores.dtype), bias.to(scores.dtype)
        return torch.einsum("bnd,bd->bn", scores, weight) + bias[:, None]


class ClassScores(Classifier):
    """No layer: the patch scores are class scores already, D' = K.

    For a classifier that is more than one linear layer, which then belongs to the layers before.
    """

    def __init__(self, layers: Callable[[], Sequence[nn.Module]], num_classes: int):
        super().__init__(layers)
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        """K."""
        return self._num_classes

    @property
    def num_features(self) -> int:
        """K."""
        return self._num_classes

    def __call__(self, scores: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes classes"]:
        """The scores."""
        return scores

    def of_target(
        self,
        scores: PatchScores,
        target: Int[Tensor, " batch"],
        *,
        contrast: bool,
    ) -> Float[Tensor, "batch patches"]:
        """Scores of one class an image."""
        chosen = scores[torch.arange(scores.shape[0], device=scores.device), :, target]
        return chosen - scores.mean(dim=-1) if contrast else chosen


def _linear_form(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or not is_linear(layer):
        raise ReadoutError(
            f"the classifier is {type(layer).__name__}; expected nn.Linear or a 1 x 1 nn.Conv2d. "
            "Pass head=nn.Linear(features, classes) to train another one."
        )
    weight = layer.weight.flatten(1)
    weight = weight.to(compute_dtype(weight))
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.to(weight.dtype)
    return weight, bias


def check_head(head: nn.Module) -> None:
    """Raise unless `head` ends in a linear layer, or is nn.Identity: class scores already.

    Raises:
        ReadoutError: It does not.
    """
    last = split_head(head)[1]
    if not isinstance(last, nn.Identity):
        _linear_form(last)


def split_head(head: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Layers before the last one of a sequential head, and the last one."""
    if isinstance(head, nn.Sequential) and len(head):
        layers = list(head)
        return layers[:-1], layers[-1]
    return [], head
