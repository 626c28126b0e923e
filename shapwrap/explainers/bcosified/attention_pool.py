"""CLIP's attention pooling as a linear map: with constant attention, or place by place."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shapwrap.explainers.bcosified.dynamic import Dynamic
from shapwrap.explainers.bcosified.layers import BcosLinear, Factor, copied


class BcosifiedAttentionPool(nn.Module, Dynamic):
    """Attention from the mean of a map to its places and their mean, without any bias.

    The positional embedding, which is one, is left out, so that maps of all sizes are taken. Of the
    projections only that of the output is a B-cos layer, and that only in `unpooled`: with pooling
    it is linear, as in the authors' code.

    Args:
        layer: CLIP's own AttentionPool2d, whose weights are copied.
        b: B of the output projection.
        factor: Its kind.
    """

    def __init__(self, layer: nn.Module, *, b: float, factor: Factor | str):
        super().__init__()
        given: Any = layer
        self.num_heads = int(given.num_heads)
        self.q_proj = _without_bias(given.q_proj)
        self.k_proj = _without_bias(given.k_proj)
        self.v_proj = _without_bias(given.v_proj)
        self.c_proj = BcosLinear(given.c_proj, b=b, factor=factor)

    def forward(
        self, features: Float[Tensor, "batch features rows columns"]
    ) -> Float[Tensor, "batch embedding"]:
        """One embedding an image; in explanation mode attention is a constant."""
        places = rearrange(features, "b d h w -> b (h w) d")
        tokens = torch.cat((places.mean(dim=1, keepdim=True), places), dim=1)
        asking = tokens.detach() if self.detached else tokens
        query = self._heads(self.q_proj(asking[:, :1]))
        key = self._heads(self.k_proj(asking))
        value = self._heads(self.v_proj(tokens))
        attention = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        pooled = rearrange(attention @ value, "b heads 1 d -> b (heads d)")
        return functional.linear(pooled, self.c_proj.weight)

    def unpooled(
        self, features: Float[Tensor, "batch features rows columns"]
    ) -> Float[Tensor, "batch places embedding"]:
        """One embedding a place, as if attention looked nowhere else; not of unit length yet."""
        places = rearrange(features, "b d h w -> b (h w) d")
        return self.c_proj(self.v_proj(places))

    def _heads(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (heads d) -> b heads n d", heads=self.num_heads)


def _without_bias(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(copied(layer.weight))
    return made
