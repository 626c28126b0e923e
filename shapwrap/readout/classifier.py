"""The last linear layer: from what a patch says to what it is worth for each class."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shapwrap.errors import ReadoutError
from shapwrap.masking.pooling import compute_dtype


class LinearClassifier:
    """One linear layer, or the average of several (distilled models), in float32.

    The layers are looked up at each call, so replacing the model's classifier keeps working.
    """

    def __init__(self, layers: Callable[[], Sequence[nn.Module]]):
        self._layers = layers
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

    def __call__(self, features: Float[Tensor, "*axes features"]) -> Float[Tensor, "*axes classes"]:
        """Class scores, bias included."""
        weight, bias = self.weight_and_bias()
        return functional.linear(features, weight.to(features.dtype), bias.to(features.dtype))

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases, for a learning rate of their own."""
        return [parameter for layer in self._layers() for parameter in layer.parameters()]


def _linear_form(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Linear):
        weight = layer.weight
    elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        weight = layer.weight.flatten(1)
    else:
        raise ReadoutError(
            f"the classifier is {type(layer).__name__}; expected nn.Linear or a 1 x 1 nn.Conv2d. "
            "Pass head=nn.Linear(features, classes) to train another one."
        )
    weight = weight.to(compute_dtype(weight))
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.to(weight.dtype)
    return weight, bias


def check_head(head: nn.Module) -> None:
    """Raise unless `head` ends in a linear layer.

    Raises:
        ReadoutError: It does not.
    """
    last = split_head(head)[1]
    _linear_form(last)


def split_head(head: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Layers before the last one of a sequential head, and the last one."""
    if isinstance(head, nn.Sequential) and len(head):
        layers = list(head)
        return layers[:-1], layers[-1]
    return [], head
