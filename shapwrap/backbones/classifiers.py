"""The classifier of a model: a linear layer, or something around one."""

from torch import Tensor, nn


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear or a 1 x 1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def linear_part(classifier: nn.Module) -> nn.Module:
    """The one linear layer of a classifier that has no other parameters, else the classifier.

    Some heads hold pooling, dropout and the linear layer in one module.
    """
    owners = [m for m in classifier.modules() if any(True for _ in m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and is_linear(owners[0]) else classifier


def reproduces(classifier: nn.Module, hidden: Tensor, output: Tensor) -> bool:
    """Whether the output of a model is this layer on `hidden`, and nothing comes after."""
    logits = classifier(hidden).flatten(1)
    scale = float(output.abs().max())
    if logits.shape != output.shape:
        return False
    return bool((logits - output).abs().max() <= 1e-4 * scale)
