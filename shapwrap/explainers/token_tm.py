"""TokenTM: rollout weighted by how much each block transforms a token. Experimental."""

import warnings

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_checks import OTHERS
from shapwrap.explainers.attention_explainer import (
    AttentionExplainer,
    positive_relevance,
    read_row,
)
from shapwrap.explainers.attention_pass import AttentionPass, Block, States
from shapwrap.explainers.explained_model import Model

TOLERANCE = 0.05
"""Share of an attention's output that its heads may fail to explain, rounding in bfloat16."""


class UnverifiedFormulaWarning(UserWarning):
    """A method whose formula could not be compared with the authors' own code."""


class TokenTM(AttentionExplainer):
    """Experimental, formula unverified: after Wu et al. 2024, who gave no code.

    A token e that a layer turns into e' has the weight W = |e'| / |e| * NECC, where NECC_i =
    T exp(cos(e_i, e'_i)) / sum_j exp(cos(e_j, e'_j)) over the T tokens. With g = d f_c / d A,

        U = I + mean_h (g * A)^+ diag(W^h)      for attention, e' = what head h adds for e
        U = I + diag(W)                         for the MLP, e' = what it adds to e

    and C = diag(|e|) of the first block's tokens, then C <- U C through the blocks. The map is the
    row of the read-out token; a pooling by attention multiplies it by mean_h (g * A)^+. Layer
    scale is part of the transformation.

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Warns:
        UnverifiedFormulaWarning: Once, when it is made.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Wu, Duan, Kang, Tang & Yan 2024, "Token Transformation Matters: Towards Faithful Post-hoc
        Explanation for Vision Transformer", CVPR.
    """

    name = "tokentm (unverified)"

    def __init__(self, model: Model, *, grid: Grid | None = None, chunk_size: int = 64):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        warnings.warn(
            "TokenTM is experimental: its formula is unverified, since its authors gave no code. "
            "Call its results 'after Wu et al. 2024, unverified'.",
            UnverifiedFormulaWarning,
            stacklevel=2,
        )

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """One row of C, from the last block to the first."""
        row = read_row(seen, positive_relevance)
        for block in reversed(seen.blocks):
            for tokens, branch in reversed(block.branches[1:]):
                size, dot = branch.norm(dim=2), (tokens * branch).sum(dim=2)
                row = row * (1 + _weight(tokens, size, dot))
            weighted = (block.weights * block.gradient).clamp(min=0)
            taken = torch.einsum("bq,bhqk->bhk", row, weighted) * _head_weights(block)
            row = row + taken.mean(dim=1)
        return (row * seen.blocks[0].tokens.norm(dim=2))[:, seen.num_prefix :]


def _head_weights(block: Block) -> Float[Tensor, "batch heads tokens"]:
    """W^h of each token, from the part of the output projection that reads head h."""
    projection = _projection_by_head(block)
    overlap = torch.einsum("bkd,hed->bhke", block.tokens, projection)
    gram = torch.einsum("hed,hfd->hef", projection, projection)
    squares = (torch.einsum("bhke,hef->bhkf", block.values, gram) * block.values).sum(dim=3)
    dot = (overlap * block.values).sum(dim=3)
    return _weight(block.tokens[:, None], squares.clamp(min=0).sqrt(), dot)


def _weight(tokens: Tensor, size: Tensor, dot: Tensor) -> Tensor:
    """|e'| / |e| times NECC, from |e'| and the product of e and e'."""
    norm = tokens.norm(dim=-1)
    tiny = torch.finfo(norm.dtype).tiny
    cosine = dot / (norm * size).clamp(min=tiny)
    return size / norm.clamp(min=tiny) * cosine.softmax(dim=-1) * cosine.shape[-1]


def _projection_by_head(block: Block) -> Float[Tensor, "heads width features"]:
    """How each head's values reach the tokens; proved on the block's own output.

    Raises:
        UnsupportedBackboneError: Something else stands between, such as a norm or a gate.
    """
    added: States = block.branches[0][1]
    if block.projection is not None:
        weight, bias = block.projection
        if block.scale is not None:
            weight = weight * block.scale[:, None]
            bias = None if bias is None else bias * block.scale
        heads = torch.einsum("bhqk,bhke->bqhe", block.weights, block.values).flatten(2)
        rebuilt = functional.linear(heads, weight, bias)
        if rebuilt.shape == added.shape and (rebuilt - added).norm() <= TOLERANCE * added.norm():
            return rearrange(weight, "d (h e) -> h e d", h=block.values.shape[1])
    raise UnsupportedBackboneError(
        "the output of attention is not one linear layer of its heads (a norm or a gate stands "
        f"between); TokenTM has no formula for that. AttentionRollout, GAME and AttCAT do. {OTHERS}"
    )
