"""Models of timm by their architecture: what `timm.create_model` needs to build them again."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from torch import nn

from shapwrap.errors import ArgumentError, SavedModelError
from shapwrap.saving.arguments import find_arguments
from shapwrap.saving.values import decode, encode

_NOT_STRUCTURE = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
_NOT_STRUCTURE |= {"cache_dir", "scriptable", "exportable"}
"""Arguments of `timm.create_model` that would read files or reach the hub."""

_OF_THIS_MACHINE = {"file", "state_dict", "architecture"}
"""What a pretrained configuration says that nobody else needs, or that is said already."""


def describe(
    model: nn.Module, architecture: str | None, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Architecture, arguments and pretrained configuration; None for a class called directly.

    Raises:
        ArgumentError: No architecture of timm, or arguments that are not about structure.
        SavedModelError: The arguments are not known.
    """
    configuration: Any = getattr(model, "pretrained_cfg", None) or {}
    told = configuration.get("architecture") if isinstance(configuration, dict) else None
    name = architecture or told
    if architecture is not None and not timm.is_model(architecture):
        raise ArgumentError(
            f"architecture is {architecture!r}; expected one of timm.list_models()."
        )
    if not name or not timm.is_model(name):
        return None
    if refused := sorted(_NOT_STRUCTURE & given.keys()):
        raise ArgumentError(
            f"constructor has {', '.join(refused)}; expected arguments that shape the model, such "
            "as img_size. Weights are saved, and not loaded from elsewhere."
        )
    arguments = find_arguments(partial(timm.create_model, name), model, given, further=True)
    kept = {key: v for key, v in configuration.items() if key not in _OF_THIS_MACHINE}
    return {
        "library": "timm",
        "architecture": name,
        "arguments": arguments,
        "pretrained_cfg": encode(kept, "pretrained_cfg"),
    }


def build(description: Mapping[str, Any], *, trust: bool, pretrained: str | None) -> nn.Module:
    """The model.

    Raises:
        SavedModelError: An unknown architecture, or arguments that would read files.
    """
    name = description["architecture"]
    # Names of other forms would be looked up on the hub, or in a folder.
    if not isinstance(name, str) or not name.isidentifier() or not timm.is_model(name):
        raise SavedModelError(
            f"the backbone is timm's {name!r}, which timm {timm.__version__} does not have; "
            "expected one of timm.list_models(). Install the version that it was saved with."
        )
    arguments = decode(description["arguments"], trust=trust)
    if refused := sorted(_NOT_STRUCTURE & arguments.keys()):
        raise SavedModelError(
            f"the backbone would be built with {', '.join(refused)}, which reads files or reaches "
            "the hub; expected arguments that shape the model. The folder was changed."
        )
    model: Any = timm.create_model(
        f"{name}.{pretrained}" if pretrained else name, pretrained=bool(pretrained), **arguments
    )
    told = {"architecture": name, **decode(description.get("pretrained_cfg") or {}, trust=False)}
    model.pretrained_cfg = model.default_cfg = told
    return model
