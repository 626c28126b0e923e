"""Which adapters exist, and which of them recognise a model."""

from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from torch import nn

from shapwrap.backbones.base import Backbone
from shapwrap.backbones.image_text import check_one_tower
from shapwrap.backbones.map_encoder import MapEncoder
from shapwrap.backbones.open_clip_resnet import OpenClipResNet
from shapwrap.backbones.open_clip_tokens import OpenClipTokens
from shapwrap.backbones.pooled_children import PooledChildren
from shapwrap.backbones.timm_beit import TimmBeit
from shapwrap.backbones.timm_cait import TimmCait
from shapwrap.backbones.timm_convit import TimmConvit
from shapwrap.backbones.timm_gemma import TimmGemma
from shapwrap.backbones.timm_hiera import TimmHiera
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_naflex import TimmNaFlex
from shapwrap.backbones.timm_qwen import TimmQwen
from shapwrap.backbones.timm_relpos import TimmRelPos
from shapwrap.backbones.timm_tnt import TimmTnt
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.timm_tower import TimmTowerMaps, TimmTowerRelPos, TimmTowerTokens
from shapwrap.backbones.timm_whole import TimmWhole
from shapwrap.backbones.torchvision_tokens import TorchvisionTokens
from shapwrap.backbones.tower_whole import TowerWhole
from shapwrap.backbones.traced import TracedMean, TracedWhole
from shapwrap.errors import BackboneTypeError

ADAPTERS: tuple[type[Backbone], ...] = (
    TimmTokens,
    TimmBeit,
    TimmRelPos,
    TimmNaFlex,
    TimmQwen,
    TimmGemma,
    TimmHiera,
    TimmCait,
    TimmConvit,
    TimmTnt,
    TorchvisionTokens,
    TimmMaps,
    OpenClipTokens,
    OpenClipResNet,
    TimmTowerTokens,
    TimmTowerRelPos,
    TimmTowerMaps,
    TowerWhole,
    PooledChildren,
    TracedMean,
    TimmWhole,
    TracedWhole,
    MapEncoder,
)
"""In order of preference: the first that recognises a model and passes its tests is used."""

ENTRY_POINTS = "shapwrap.backbones"
"""Group under which an installed package names its adapters."""

_registered: list[type[Backbone]] = []

Adapter = TypeVar("Adapter", bound=type)


def register_backbone(adapter: Adapter) -> Adapter:
    """The adapter itself, after putting it before all others; use it as a decorator.

    Args:
        adapter: A subclass of `Backbone` (or of an adapter that shapwrap has).

    Raises:
        BackboneTypeError: It is none.
    """
    if not issubclass(adapter, Backbone):
        raise BackboneTypeError(
            f"{adapter!r} cannot be registered; expected a subclass of shapwrap.Backbone."
        )
    if adapter not in _registered:
        _registered.insert(0, adapter)
    return adapter


@cache
def _installed() -> tuple[type[Backbone], ...]:
    """Adapters of installed packages; one that cannot be imported raises its own error."""
    return tuple(entry.load() for entry in entry_points(group=ENTRY_POINTS))


def candidates(model: nn.Module) -> list[Backbone]:
    """Adapters that recognise the parts of `model`, best first; never empty.

    Raises:
        BackboneTypeError: An image-text model.
    """
    check_one_tower(model)
    adapters = (*_registered, *_installed(), *ADAPTERS)
    return [adapter(model) for adapter in adapters if adapter.recognises(model)]
