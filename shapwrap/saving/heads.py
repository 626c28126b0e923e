"""A head that was passed in, as JSON: its layers by class and arguments."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shapwrap.errors import SavedModelError
from shapwrap.saving.arguments import find_arguments
from shapwrap.saving.values import class_at, decode, encode, path_of


def describe_head(head: nn.Module) -> dict[str, Any]:
    """What `build_head` needs to make such a head again, with other weights.

    Raises:
        SavedModelError: The arguments of a layer are not known.
        ArgumentError: The class of a layer cannot be imported by a name.
    """
    if type(head) is nn.Sequential:
        return {"layers": {name: describe_head(layer) for name, layer in head.named_children()}}
    arguments = find_arguments(type(head), head, {})
    return {"path": path_of(type(head)), "arguments": encode(arguments, "head")}


def build_head(description: Mapping[str, Any], *, trust: bool) -> nn.Module:
    """The head, on the CPU, with random weights; the global random state is left alone.

    Raises:
        SavedModelError: A class that may not be named, or arguments that it does not take.
    """
    if "layers" in description:
        layers = OrderedDict(
            (name, build_head(layer, trust=trust)) for name, layer in description["layers"].items()
        )
        return nn.Sequential(layers)
    cls = class_at(description["path"], trust=trust)
    try:
        with torch.random.fork_rng(devices=[]):
            return cls(**decode(description["arguments"], trust=trust))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SavedModelError(
            f"a layer of the head, {description['path']}, cannot be built as it was saved "
            f"({error}); pass head= to build it yourself."
        ) from error
