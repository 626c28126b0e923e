"""Classifiers of torchvision by the name of the function that builds them."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torchvision
from torch import nn

from shapwrap.errors import ArgumentError, SavedModelError
from shapwrap.saving.arguments import find_arguments
from shapwrap.saving.values import decode

_NOT_STRUCTURE = {"weights", "progress", "weights_backbone"}


def describe(
    model: nn.Module, architecture: str | None, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Architecture and arguments; None where no function of torchvision builds such a model.

    Raises:
        ArgumentError: No architecture of torchvision.
        SavedModelError: The named architecture does not build this model.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if architecture is not None:
        if architecture not in names:
            raise ArgumentError(
                f"architecture is {architecture!r}; expected one of "
                "torchvision.models.list_models()."
            )
        arguments = find_arguments(_builder(architecture), model, given)
        return {"library": "torchvision", "architecture": architecture, "arguments": arguments}
    here = [
        name
        for name in names
        if torchvision.models.get_model_builder(name).__module__ == type(model).__module__
    ]
    # Few arguments make other tensors; those that do are tried last.
    for alike, name in product((True, False), here):
        try:
            arguments = find_arguments(_builder(name), model, given, alike=alike)
        except SavedModelError:
            continue
        return {"library": "torchvision", "architecture": name, "arguments": arguments}
    return None


def build(description: Mapping[str, Any], *, trust: bool, pretrained: str | None) -> nn.Module:
    """The model.

    Raises:
        SavedModelError: An unknown architecture, or arguments that would read files.
    """
    name = description["architecture"]
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise SavedModelError(
            f"the backbone is torchvision's {name!r}, which torchvision "
            f"{torchvision.__version__} does not have; install the version that it was saved with."
        )
    arguments = decode(description["arguments"], trust=trust)
    if refused := sorted(_NOT_STRUCTURE & arguments.keys()):
        raise SavedModelError(
            f"the backbone would be built with {', '.join(refused)}, which loads weights; expected "
            "arguments that shape the model. The folder was changed."
        )
    model = _builder(name)(**arguments)
    if pretrained:
        weights: Any = torchvision.models.get_model_weights(name)
        state = weights[pretrained].get_state_dict(check_hash=True)
        own = model.state_dict()
        # A classifier of another number of classes is as it was made; it is saved, or new.
        fitting = {key: tensor for key, tensor in state.items() if tensor.shape == own[key].shape}
        model.load_state_dict({**own, **fitting})
    return model


def _builder(name: str) -> Any:
    return partial(torchvision.models.get_model, name, weights=None)
