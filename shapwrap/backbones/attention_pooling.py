"""Attention pooling by one query, written as a mean over patches.

What such a pooling gives is sum_n a_n v_n, with attention weights a and values v. Patch n gets the
feature N a_n v_n (per head), so that the mean over patches is the pooled vector and every layer
that follows reads a mean, as after average pooling. The weights depend on all patches that are
present, as the scale of a normalisation does.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shapwrap._types import PatchFeatures
from shapwrap.masking.pooling import compute_dtype

Part = Bool[Tensor, "items tokens"]
"""Which of two parts a token belongs to: each part is pooled by itself."""


class Attention(NamedTuple):
    """Query of the pooling, keys and values of the tokens, before scaling."""

    query: Float[Tensor, "#items heads width"]
    key: Float[Tensor, "items heads tokens width"]
    value: Float[Tensor, "items heads tokens value_width"]


def contributions(attention: Attention, part: Part, num_extra: int) -> PatchFeatures:
    """Features of the patches, [items, N, heads * width], whose mean over a part is its pooling.

    Args:
        attention: Of all tokens, `num_extra` of which come first and are no patches.
        part: Two parts of the tokens; the softmax of each runs over its own tokens alone.
        num_extra: Class tokens, registers or a mean token; what they contribute is shared equally
            among the patches of their part.
    """
    query, key, value = (tensor.to(compute_dtype(tensor)) for tensor in attention)
    scores = torch.einsum("ihd,ihtd->iht", query.expand(key.shape[0], -1, -1), key)
    scores = scores * query.shape[-1] ** -0.5
    in_part = part[:, None]
    lowest = torch.finfo(scores.dtype).min
    weights = torch.where(
        in_part,
        scores.masked_fill(~in_part, lowest).softmax(dim=-1),
        scores.masked_fill(in_part, lowest).softmax(dim=-1),
    )
    weighted = torch.einsum("iht,ihtd->ithd", weights, value).flatten(2)
    extra, patches = weighted[:, :num_extra], weighted[:, num_extra:]
    members, extra_members = part[:, num_extra:], part[:, :num_extra, None]
    present = members.sum(dim=1, keepdim=True)
    count = torch.where(members, present, members.shape[1] - present)
    features = patches * count[..., None]
    if num_extra:
        shared = torch.where(extra_members, extra, 0.0).sum(dim=1, keepdim=True)
        others = torch.where(extra_members, 0.0, extra).sum(dim=1, keepdim=True)
        features = features + torch.where(members[..., None], shared, others)
    return features


class AttentionPooling(ABC):
    """A pooling layer of a model, seen as query, keys, values, and what follows."""

    @abstractmethod
    def attention(self, tokens: Tensor) -> Attention:
        """Query, keys and values of tokens [items, T, D]."""

    @abstractmethod
    def after(self, pooled: Tensor) -> Tensor:
        """The layers between the weighted mean and what the pooling layer returns."""


class LatentPooling(AttentionPooling):
    """A learned query, then a projection and an MLP with a shortcut (MAP heads)."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether the layer is built like timm's AttentionPoolLatent with one query in use."""
        parts = ("latent", "q", "kv", "q_norm", "k_norm", "proj", "mlp", "num_heads")
        return (
            all(hasattr(layer, part) for part in parts)
            and getattr(layer, "pos_embed", None) is None
            and (getattr(layer, "latent_len", 0) == 1 or getattr(layer, "pool", "") == "token")
        )

    def attention(self, tokens: Tensor) -> Attention:
        """Keys and values of the tokens, the query of the first latent."""
        layer = self.layer
        query = layer.q(layer.latent[:, :1]).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        key, value = layer.kv(tokens).unflatten(-1, (2, layer.num_heads, -1)).unbind(2)
        key = layer.k_norm(key.transpose(1, 2))
        return Attention(layer.q_norm(query)[:, :, 0], key, value.transpose(1, 2))

    def after(self, pooled: Tensor) -> Tensor:
        """Projection, and the MLP with its shortcut."""
        hidden = self.layer.proj(pooled)
        return (
            hidden if self.layer.mlp is None else hidden + self.layer.mlp(self.layer.norm(hidden))
        )
