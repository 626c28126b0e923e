"""Models that are built by their class: a user's own, or a library's class called directly."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shapwrap.errors import SavedModelError
from shapwrap.saving.arguments import find_arguments
from shapwrap.saving.values import class_at, decode, path_of


def describe(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Path of the class and constructor arguments.

    Raises:
        SavedModelError: The arguments are not known.
        ArgumentError: The class cannot be imported by a name.
    """
    path = path_of(type(model))
    arguments = find_arguments(type(model), model, given)
    return {"library": "class", "path": path, "arguments": arguments}


def build(description: Mapping[str, Any], *, trust: bool, pretrained: str | None) -> nn.Module:
    """The model.

    Raises:
        SavedModelError: A class that may not be named, or is none of a model; or `pretrained`,
            which only a library has.
    """
    if pretrained is not None:
        raise SavedModelError(
            f"{description['path']} has no pretrained weights by a name; expected model= with the "
            "weights that were fine-tuned."
        )
    cls = class_at(description["path"], trust=trust)
    if not issubclass(cls, nn.Module):
        raise SavedModelError(f"{description['path']} is no nn.Module; expected a model's class.")
    return cls(**decode(description["arguments"], trust=trust))
