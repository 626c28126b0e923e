"""The classifier of a model: a linear layer, or something around one."""

import torch
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.backbones.recording import replaced_output


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear or a 1 x 1 convolution, and its weight is all there is to it."""
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1) or layer.groups != 1:
            return False
        plain = type(layer).forward is nn.Conv2d.forward
    else:
        plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    # Norms of the old kind (nn.utils.weight_norm) write the weight anew in a hook of each pass.
    return plain and "weight" not in vars(layer)


def comes_last(classifier: nn.Module, model: nn.Module, images: Images, output: Tensor) -> bool:
    """Whether the model returns what this layer returns, whatever that is.

    Tried with random logits: an untrained layer of zeros would agree with anything.
    """
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []

    def draw(logits: Tensor) -> Tensor:
        made.append((torch.randn(logits.shape, generator=generator) * 10).to(logits))
        return made[-1]

    with replaced_output(classifier, draw):
        found = model(images)
    if not isinstance(found, Tensor) or found.shape != output.shape or len(made) != 1:
        return False
    # Attention pooling of a map projects every token, of which the first is read.
    drawn = made[0][:, 0] if made[0].ndim == 3 else made[0].flatten(1)
    return drawn.shape == found.shape and torch.equal(found, drawn)


def linear_part(classifier: nn.Module) -> nn.Module:
    """The one linear layer of a classifier that has no other parameters, else the classifier.

    Some heads hold pooling, dropout and the linear layer in one module.
    """
    owners = [m for m in classifier.modules() if any(True for _ in m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and is_linear(owners[0]) else classifier
