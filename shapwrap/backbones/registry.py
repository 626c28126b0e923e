"""Which adapters exist, and which of them recognise a model.

Each adapter registers itself at the foot of its own file; the files of this folder are found, not
listed, so that a new family is one new file.
"""

import pkgutil
from enum import IntEnum
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from torch import nn

import shapwrap.backbones
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.image_text import check_one_tower
from shapwrap.errors import BackboneTypeError


class Preference(IntEnum):
    """In which order adapters are tried: the most faithful way to hide and read patches first."""

    OWN = 0
    """Registered from outside the package."""
    TOKENS = 1
    """Removes tokens, where the removal test passes."""
    MAP = 2
    """A family's feature map, whose mean its head reads."""
    CHILDREN = 3
    """Children of the model in their order."""
    TRACED_MEAN = 4
    """A map found by tracing, whose mean is read."""
    WHOLE = 5
    """A family's models with the head kept whole."""
    TRACED = 6
    """Any model that returns logits, with the head kept whole."""
    ENCODER = 7
    """Any model that returns patches."""


ENTRY_POINTS = "shapwrap.backbones"
"""Group under which an installed package names its adapters."""

_registered: dict[type[Backbone], Preference] = {}

Adapter = TypeVar("Adapter", bound=type)


def register_backbone(adapter: Adapter, preference: Preference = Preference.OWN) -> Adapter:
    """The adapter itself, after registering it; use it as a decorator.

    Args:
        adapter: A subclass of `Backbone` (or of an adapter that shapwrap has).
        preference: When it is tried; by default before all others.

    Raises:
        BackboneTypeError: It is no subclass of `Backbone`.
    """
    if not issubclass(adapter, Backbone):
        raise BackboneTypeError(
            f"{adapter!r} cannot be registered; expected a subclass of shapwrap.Backbone."
        )
    _registered[adapter] = preference
    return adapter


@cache
def _find_adapters() -> None:
    """Imports the adapters of this folder and of installed packages.

    One that cannot be imported raises its own error.
    """
    for module in pkgutil.iter_modules(shapwrap.backbones.__path__):
        import_module(f"{shapwrap.backbones.__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        register_backbone(entry.load())


def adapters() -> list[type[Backbone]]:
    """All adapters, in the order in which they are tried."""
    _find_adapters()
    return sorted(_registered, key=lambda adapter: _registered[adapter])


def candidates(model: nn.Module) -> list[Backbone]:
    """Adapters that recognise the parts of `model`, best first; never empty.

    Raises:
        BackboneTypeError: An image-text model.
    """
    check_one_tower(model)
    return [adapter(model) for adapter in adapters() if adapter.recognises(model)]
