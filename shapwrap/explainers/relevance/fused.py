"""Fused attention as the single operations that it stands for."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shapwrap.errors import UnsupportedBackboneError


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Values [..., Q, D] of `torch.nn.functional.scaled_dot_product_attention`."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, dim=-3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores)
    probabilities = functional.dropout(scores.softmax(dim=-1), dropout_p)
    return probabilities @ value


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output [Q, B, D] and probabilities of `multi_head_attention_forward`.

    Raises:
        UnsupportedBackboneError: Learned or zero keys, static keys, or no batch axis.
    """
    extras = (bias_k, bias_v, static_k, static_v)
    if query.ndim != 3 or add_zero_attn or any(extra is not None for extra in extras):
        raise UnsupportedBackboneError(
            "the model calls multi-head attention with extra or static keys, or without a batch "
            f"axis (query {tuple(query.shape)}); expected plain attention over [T, B, D]."
        )
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        weights = (in_proj_weight,)
    heads = _projected((query, key, value), weights, in_proj_bias)
    queries, keys, values = (
        # [T, B, h * d] to [B, h, T, d]
        t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        for t in heads
    )
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if attn_mask is not None:
        shape = (-1, num_heads) if attn_mask.ndim == 3 else (1, 1)
        mask = attn_mask.reshape(*shape, *attn_mask.shape[-2:])
        scores = scores + _additive(_allowed(mask), scores)
    if key_padding_mask is not None:
        scores = scores + _additive(_allowed(key_padding_mask[:, None, None]), scores)
    probabilities = functional.dropout(scores.softmax(dim=-1), dropout_p, training)
    mixed = (probabilities @ values).permute(2, 0, 1, 3).flatten(2)
    output = functional.linear(mixed, out_proj_weight, out_proj_bias)
    if not need_weights:
        return output, None
    return output, probabilities.mean(dim=1) if average_attn_weights else probabilities


UNFUSED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "multi_head_attention_forward": multi_head_attention,
}
"""By the name of the fused function."""


def _projected(
    given: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor | None, ...], bias: Tensor | None
) -> tuple[Tensor, ...]:
    query, key, value = given
    if len(weights) == 1 and query is key is value and weights[0] is not None:
        # One use of the tokens, as in a layer for queries, keys and values together.
        return functional.linear(query, weights[0], bias).chunk(3, dim=-1)
    parts = weights
    if len(weights) == 1 and weights[0] is not None:
        parts = weights[0].chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(
        functional.linear(tokens, weight, shift)
        for tokens, weight, shift in zip(given, parts, biases, strict=True)
        if weight is not None
    )


def _allowed(mask: Tensor) -> Tensor:
    """Multi-head attention marks what is forbidden, the scaled dot product what is allowed."""
    return ~mask if mask.dtype == torch.bool else mask


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """What to add to scores: the mask, or minus infinity where a boolean one is False."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
