"""GAME, the generic attention explainability of Chefer et al."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.explainers.attention_explainer import (
    AttentionExplainer,
    check_blocks,
    positive_relevance,
    read_row,
)
from shapwrap.explainers.attention_pass import AttentionPass
from shapwrap.explainers.explained_model import Model


class GAME(AttentionExplainer):
    """R = I, then R <- R + mean_h (g * A)^+ R through the blocks, with g = d f_c / d A.

    The map is the row of the read-out token. Rows are not normalised.

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        blocks: "all", or "last": the last block alone, as in comparisons on CLIP that followed
            Zhao et al. 2024.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: Unknown blocks, a chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Chefer, Gur & Wolf 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal
        and Encoder-Decoder Transformers", ICCV.
    """

    name = "game"

    def __init__(
        self,
        model: Model,
        *,
        blocks: str = "all",
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_blocks(blocks)
        self.blocks = blocks
        if blocks == "last":
            self.name = "game (last block)"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """One row of R, from the last block to the first."""
        row = read_row(seen, positive_relevance)
        for block in reversed(seen.blocks[-1 if self.blocks == "last" else 0 :]):
            relevance = positive_relevance(block.weights, block.gradient)
            row = row + torch.einsum("bq,bqk->bk", row, relevance)
        return row[:, seen.num_prefix :]
