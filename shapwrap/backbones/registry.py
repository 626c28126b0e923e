"""Which adapters exist, and which of them recognise a model."""

from torch import nn

from shapwrap.backbones.base import Backbone
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
from shapwrap.backbones.torchvision_tokens import TorchvisionTokens
from shapwrap.errors import UnsupportedBackboneError

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
    PooledChildren,
)
"""In order of preference: the first that recognises a model and passes its tests is used."""


def candidates(model: nn.Module) -> list[Backbone]:
    """Adapters that recognise the parts of `model`, best first.

    Raises:
        UnsupportedBackboneError: None does.
    """
    found = [adapter(model) for adapter in ADAPTERS if adapter.recognises(model)]
    if not found:
        families = ", ".join(adapter.family for adapter in ADAPTERS)
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise UnsupportedBackboneError(
            f"{type(model).__name__} has the children {children}; expected one of: {families}. "
            "Give the model timm's forward_features, forward_head and get_classifier, or build "
            "it as children in order around one nn.AdaptiveAvgPool2d(1)."
        )
    return found
