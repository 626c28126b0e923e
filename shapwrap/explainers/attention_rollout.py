"""Attention rollout: attention multiplied through all blocks."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers.attention_explainer import AttentionExplainer, check_blocks, read_row
from shapwrap.explainers.attention_pass import AttentionPass
from shapwrap.explainers.explained_model import Model


class AttentionRollout(AttentionExplainer):
    """Row of the read-out token in the product of (mean_h A + I), each row normalised to sum 1.

    The same for every class.

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        start_layer: First block of the product: 0 as in the paper; Chefer et al.'s scripts use 1.
        blocks: "all", or "last": the last block alone, as in comparisons on CLIP that followed
            Zhao et al. 2024.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A negative start layer, one beside `blocks="last"`, unknown blocks, a chunk
            size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", ACL.
    """

    name = "attention rollout"

    def __init__(
        self,
        model: Model,
        *,
        start_layer: int = 0,
        blocks: str = "all",
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_at_least("start_layer", start_layer, 0)
        check_blocks(blocks)
        if blocks == "last" and start_layer:
            raise ArgumentError(
                f"start_layer is {start_layer} and blocks is 'last'; expected one of the two."
            )
        self.start_layer = start_layer
        self.blocks = blocks
        if blocks == "last":
            self.name = "attention rollout (last block)"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """One row of the product, from the last block to the first."""
        if self.start_layer >= len(seen.blocks):
            raise UnsupportedBackboneError(
                f"start_layer is {self.start_layer}, and the model has {len(seen.blocks)} blocks; "
                "expected an earlier layer."
            )
        row = read_row(seen, lambda weights, _: weights.mean(dim=1))
        first = -1 if self.blocks == "last" else self.start_layer
        for block in reversed(seen.blocks[first:]):
            attention = block.weights.mean(dim=1)
            # Rows that see no token at all sum to zero before the identity is added.
            normalised = row / (1 + attention.sum(dim=2))
            row = normalised + torch.einsum("bq,bqk->bk", normalised, attention)
        return row[:, seen.num_prefix :]
