"""A backbone as JSON: its library, architecture and constructor arguments, proved to rebuild it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shapwrap.errors import ArgumentError, SavedModelError, ShapwrapError
from shapwrap.saving import named_classes, open_clip_models, timm_models, torchvision_models
from shapwrap.saving.heads import build_head, describe_head
from shapwrap.saving.values import encode

Description = dict[str, Any]

BUILDERS = {
    "timm": timm_models.build,
    "torchvision": torchvision_models.build,
    "open_clip": open_clip_models.build,
}


def describe(
    model: nn.Module,
    *,
    architecture: str | None = None,
    constructor: Mapping[str, Any] | None = None,
) -> Description:
    """What `build` needs to make this model again, with other weights.

    It is built once without data, and compared: classes, plain attributes, shapes of all tensors.

    Args:
        model: The backbone, with the structure that it was built with.
        architecture: Its name in its library, where the model does not tell.
        constructor: Arguments it was built with, where the model does not tell them.

    Raises:
        SavedModelError: It is not rebuilt by what is known.
        ArgumentError: Arguments that JSON cannot hold, or a class that cannot be imported.
    """
    given = dict(constructor or {})
    encode(given)
    library = type(model).__module__.split(".")[0]
    found: Description | None = None
    if library == "timm":
        found = timm_models.describe(model, architecture, given)
    elif library == "torchvision":
        found = torchvision_models.describe(model, architecture, given)
    elif library == "open_clip":
        found = open_clip_models.describe(model, architecture, given)
    elif architecture is not None:
        raise ArgumentError(
            f"architecture is {architecture!r}, but {type(model).__name__} is a class of "
            f"{library!r}; expected a model of timm, torchvision or open_clip. Leave it out."
        )
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if type(model) is nn.Sequential and not given:
        return {"class": name, "library": "layers", **describe_head(model)}
    if found is None:
        found = named_classes.describe(model, given)
    return {"class": name, **found, "arguments": encode(found["arguments"], "constructor")}


def given(model: nn.Module) -> Description:
    """The description of a backbone that whoever loads it builds."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return {"library": None, "class": name}


def build(
    description: Mapping[str, Any], *, trust: bool = False, pretrained: str | None = None
) -> nn.Module:
    """The model of a description, in train mode on the CPU.

    Its weights are random; the global random state is left alone.

    Args:
        description: As `describe` returned it.
        trust: Import classes of other packages than the libraries.
        pretrained: The library's own name of pretrained weights, to have those.

    Raises:
        SavedModelError: Something unknown, malformed, or that cannot be built here.
    """
    library = description.get("library")
    if library is None:
        raise SavedModelError(
            f"the backbone, {description.get('class')}, was saved without what rebuilds it; "
            "expected model=, an instance built as the one that was saved."
        )
    if library not in (known := ("layers", "class", *BUILDERS)):
        raise SavedModelError(
            f"the backbone is of library {library!r}; expected one of {known}. It was saved by "
            "another version; pass model= to build it yourself."
        )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Libraries warn about their own defaults.
            warnings.simplefilter("ignore")
            if library == "layers":
                return build_head(description, trust=trust)
            if library == "class":
                return named_classes.build(description, trust=trust, pretrained=pretrained)
            return BUILDERS[library](description, trust=trust, pretrained=pretrained)
    except ShapwrapError:
        raise
    except Exception as error:  # a constructor of any library raises what it likes
        raise SavedModelError(
            f"{description.get('architecture') or description.get('class')} cannot be built as it "
            f"was saved ({type(error).__name__}: {error}); expected the version of {library} that "
            "it was saved with. Or build the backbone yourself and pass model=."
        ) from error
