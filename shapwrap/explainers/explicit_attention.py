"""Attention written out, so that its weights can be kept and differentiated."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap.errors import UnsupportedBackboneError
from shapwrap.masking.pooling import compute_dtype, without_autocast

Weights = Float[Tensor, "... heads queries keys"]
"""[B, heads, queries, keys] in all that are explained; rows sum to one."""
Values = Float[Tensor, "... heads keys width"]


class Projection(NamedTuple):
    """The linear layer that reads all heads of an attention, one after the other."""

    weight: Float[Tensor, "features heads_width"]
    bias: Float[Tensor, " features"] | None


class Attended(NamedTuple):
    """What one attention computed."""

    output: Tensor
    weights: Weights
    values: Values
    scores: Weights
    """What the softmax was taken of."""
    query: Tensor | None
    """[B, H, Q, D]; None where attention is written by hand in a way that hides it."""
    key: Tensor | None
    """[B, H, K, D]."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, with its weights.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D], or fewer heads with `enable_gqa`.
        value: [B, H, K, E].
        attn_mask: Bool, True where a query may look, or float that is added to the scores.
        dropout_p: Must be 0.
        is_causal: Queries see keys up to their own place.
        scale: Of the scores; 1 / sqrt(D) if None.
        enable_gqa: Each head of keys and values serves several heads of queries.

    Raises:
        UnsupportedBackboneError: Dropout of weights, in eval mode.
    """
    if dropout_p > 0:
        raise UnsupportedBackboneError(
            f"the model drops attention weights in eval mode (dropout_p={dropout_p}); expected 0. "
            "Its attention is random, and no explanation of it could be repeated."
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    # The gradient of a half-precision softmax would underflow.
    dtype = compute_dtype(query)
    with without_autocast(query):
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * factor
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores + _additive(~allowed, scores)
        if attn_mask is None:
            weights = scores.softmax(dim=-1)
        else:
            forbidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
            # Added rather than filled in: relevance propagation walks back through single steps.
            scores = scores + _additive(forbidden, scores).to(dtype)
            # A query without any key gets zeros, and must not make the gradients of others NaN.
            blind = torch.isneginf(scores).all(dim=-1, keepdim=True)
            weights = scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
        if not weights.requires_grad and torch.is_grad_enabled():
            weights.requires_grad_()
        output = (weights @ value.to(dtype)).to(value.dtype)
    return Attended(output, weights, value, scores, query, key)


class MultiHead(NamedTuple):
    """What one call of `torch.nn.functional.multi_head_attention_forward` computed."""

    attended: Attended
    projection: Projection
    output: Tensor
    returned_weights: Tensor | None


def multi_head(
    query: Float[Tensor, "queries batch features"],
    key: Float[Tensor, "keys batch key_features"],
    value: Float[Tensor, "keys batch value_features"],
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
    *,
    through: Callable[..., Attended] = attend,
) -> MultiHead:
    """The function behind `nn.MultiheadAttention`, under its own argument names.

    What computes the heads is `through`: `attend`, or something in its place.

    Raises:
        UnsupportedBackboneError: Keys that are no tokens (`bias_k`, `add_zero_attn`, `static_k`),
            no batch axis, or dropout of weights.
    """
    extra = bias_k, bias_v, static_k, static_v
    if add_zero_attn or any(e is not None for e in extra) or query.ndim != 3:
        raise UnsupportedBackboneError(
            "nn.MultiheadAttention attends to keys that are no tokens (bias_k, bias_v, "
            "add_zero_attn, static_k) or has no batch axis; expected one key for each token."
        )
    if use_separate_proj_weight or in_proj_weight is None:
        matrices = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        matrices = (in_proj_weight,)
    queries, keys, values = (
        rearrange(x, "t b (h d) -> b h t d", h=num_heads)
        for x in _projected((query, key, value), matrices, in_proj_bias)
    )
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, queries)
        mask = mask if mask.ndim == 2 else mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, queries)[:, None, None]
        mask = padding if mask is None else mask + padding
    attended = through(queries, keys, values, mask, dropout_p if training else 0.0)
    merged = rearrange(attended.output, "b h t d -> t b (h d)")
    returned = None
    if need_weights:
        weights = attended.weights.to(query.dtype)
        returned = weights.mean(dim=1) if average_attn_weights else weights
    projection = Projection(out_proj_weight, out_proj_bias)
    return MultiHead(attended, projection, functional.linear(merged, *projection), returned)


def _projected(
    given: tuple[Tensor, Tensor, Tensor],
    matrices: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    query, key, value = given
    packed = matrices[0] if len(matrices) == 1 else None
    if packed is not None and query is key is value:
        # One use of the tokens, as in a layer for queries, keys and values together.
        return functional.linear(query, packed, bias).chunk(3, dim=-1)
    parts = matrices if packed is None else packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        functional.linear(x, w, b)
        for x, w, b in zip(given, parts, biases, strict=True)
        if w is not None
    )


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is True where attention is forbidden, as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf)
