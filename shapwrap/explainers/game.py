"""GAME, the generic attention explainability of Chefer et al."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.explainers.attention_explainer import (
    AttentionExplainer,
    positive_relevance,
    read_row,
)
from shapwrap.explainers.attention_pass import AttentionPass


class GAME(AttentionExplainer):
    """R = I, then R <- R + mean_h (g * A)^+ R through the blocks, with g = d f_c / d A.

    The map is the row of the read-out token. Rows are not normalised.

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Chefer, Gur & Wolf 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal
        and Encoder-Decoder Transformers", ICCV.
    """

    name = "game"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """One row of R, from the last block to the first."""
        row = read_row(seen, positive_relevance)
        for block in reversed(seen.blocks):
            relevance = positive_relevance(block.weights, block.gradient)
            row = row + torch.einsum("bq,bqk->bk", row, relevance)
        return row[:, seen.num_prefix :]
