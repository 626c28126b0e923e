"""CoCa's attentional pooler: learned queries, of which the first makes the embedding."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from shapwrap.backbones.attention_pooling import Attention, AttentionPooling


class QueryPooling(AttentionPooling):
    """Built like open_clip's AttentionalPooler: `query`, `ln_q`, `ln_k` and `attn`."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether the parts are there, the attention one of torch's without tokens of its own."""
        parts = ("query", "ln_q", "ln_k")
        attention = getattr(layer, "attn", None)
        return (
            all(hasattr(layer, part) for part in parts)
            and isinstance(attention, nn.MultiheadAttention)
            and attention.bias_k is None
            and not attention.add_zero_attn
        )

    def attention(self, tokens: Tensor) -> Attention:
        """Keys and values of the tokens, the first query."""
        attention: nn.MultiheadAttention = self.layer.attn
        if attention.in_proj_weight is None:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        normed = self.layer.ln_k(tokens)
        first = self.layer.ln_q(self.layer.query[None, :1])
        query, key, value = (
            functional.linear(given, weight, bias)
            .unflatten(-1, (attention.num_heads, -1))
            .transpose(1, 2)
            for given, weight, bias in zip((first, normed, normed), weights, biases, strict=True)
        )
        return Attention(query[:, :, 0], key, value)

    def after(self, pooled: Tensor) -> Tensor:
        """The output projection."""
        projection = self.layer.attn.out_proj
        return projection(pooled.to(projection.weight.dtype))
