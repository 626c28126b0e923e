"""Transformer attribution: relevance propagation and gradients meet at the attention."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.relevance import (
    AttentionProduct,
    Tape,
    attention_products,
    relevance_of_attention,
)
from shapwrap.masking.batch_norm import without_recomputation
from shapwrap.masking.pooling import compute_dtype, without_autocast
from shapwrap.probing import in_full_precision


class CheferLRP(Explainer):
    """Chefer's transformer attribution, for any vision transformer with global attention.

    Relevance R starts as one-hot at the class and goes backwards through every operation that the
    forward pass ran; A_l are the attention probabilities of block l and g_l the gradient of the
    logit. With Abar_l = mean over heads of (g_l * R_l)^+ the values are a row of
    (I + Abar_L) ... (I + Abar_s) - I, for the patches: the row of the class token, or the mean over
    the rows of the tokens that the head reads, for a model without one. Attentional pooling has no
    skip connection of its own: its row of Abar comes without I.

    Values are not negative and sum to nothing in particular. No module is changed: the operations
    are recorded as they run, and fused attention runs as its single steps.

    Args:
        model: A module, a wrapped model, or a function with `grid`.
        start_layer: The first block that counts, s. The method's own evaluation scripts skip the
            first block (1).
        double: Compute in float64, whatever the model's precision: relevance is divided by sums
            that may be near zero, and in float32 rounding may show in deep models.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A negative `start_layer`, or `double` for a function.

    References:
        Chefer, Gur & Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021.
    """

    name = "chefer-lrp"
    any_grid = False

    def __init__(
        self,
        model: Model,
        *,
        start_layer: int = 0,
        double: bool = False,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_at_least("start_layer", start_layer, 0)
        if double and self.model.module is None:
            raise ArgumentError(
                "double=True for a function, whose weights are out of reach; expected an nn.Module."
            )
        self.start_layer = start_layer
        self.double = double

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """One forward pass a chunk, and one walk back.

        Raises:
            UnsupportedBackboneError: No global attention, or an operation without a rule.
            ArgumentError: `start_layer` beyond the last block, or a grid of another model.
        """
        grid = self.model.grid_of(images)
        module = nn.Identity() if self.model.module is None else self.model.module
        precision = torch.float64 if self.double else compute_dtype(images)
        parts = []
        with (
            in_full_precision(module, double=self.double),
            without_recomputation(module),
            without_autocast(images),
            torch.enable_grad(),
        ):
            for chunk, classes in zip(
                images.split(self.chunk_size), target.split(self.chunk_size), strict=True
            ):
                parts.append(self._of_chunk(chunk.to(precision), classes, grid))
        return Attribution(torch.cat(parts).to(compute_dtype(images)), grid)

    def _of_chunk(
        self, images: Images, target: Int[Tensor, " batch"], grid: Grid
    ) -> Float[Tensor, "batch patches"]:
        images = images.clone().requires_grad_()
        tape = Tape(images)
        with tape:
            logits = self.model.logits(images)
        products = attention_products(tape, len(images))
        num_tokens = products[0].probabilities.shape[-1]
        if len(images) == num_tokens > 1:
            # Rules for single images look for the axis whose length is their number.
            del tape, products, logits
            halves = zip(
                images.detach().split(num_tokens - 1), target.split(num_tokens - 1), strict=True
            )
            return torch.cat([self._of_chunk(*half, grid) for half in halves])
        if not tape.is_live(logits):
            raise UnsupportedBackboneError(
                "the logits were not made from the images by torch functions with gradients "
                "(scripted, compiled or detached code); expected an eager, differentiable forward "
                "pass."
            )
        gradients = torch.autograd.grad(
            logits.gather(1, target[:, None]).sum(),
            [product.probabilities for product in products],
            allow_unused=True,
            retain_graph=True,
        )
        blocks = [
            (product, gradient)
            for product, gradient in zip(products, gradients, strict=True)
            if gradient is not None
        ]
        self._check(len(blocks), num_tokens, grid)
        num_prefix = num_tokens - grid[0] * grid[1]
        _check_prefix(images, products[0], num_prefix)
        blocks = blocks[self.start_layer :]
        relevance = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
        relevances = relevance_of_attention(tape, logits, relevance, [block[0] for block in blocks])
        row = _row_read(blocks, relevances, len(images))
        return row[:, num_prefix:]

    def _check(self, num_blocks: int, num_tokens: int, grid: Grid) -> None:
        if num_blocks == 0:
            raise UnsupportedBackboneError(
                "no attention of the model has an influence on its logits; expected logits that "
                "gradients reach attention from."
            )
        if self.start_layer >= num_blocks:
            raise ArgumentError(
                f"start_layer is {self.start_layer}, but the model has {num_blocks} attentions; "
                f"expected at most {num_blocks - 1}."
            )
        if grid[0] * grid[1] > num_tokens:
            raise ArgumentError(
                f"grid is {grid[0]} x {grid[1]}, but attention is over {num_tokens} tokens; "
                "expected the model's own patches."
            )


def _check_prefix(images: Images, product: AttentionProduct, num_prefix: int) -> None:
    """Raise unless the tokens before the patches know nothing of the image in the first block."""
    values = product.by_image(product.operation.arguments[1], len(images))
    (gradient,) = torch.autograd.grad(values[:, :, :num_prefix].sum(), images, retain_graph=True)
    if gradient.any():
        patches = values.shape[2] - num_prefix
        raise UnsupportedBackboneError(
            f"the model has {patches} patches, but attention is over {values.shape[2]} tokens, and "
            f"the first {num_prefix} of them come from the image too; expected class and register "
            "tokens followed by one token a patch. Pass grid= if attention has another grid."
        )


def _row_read(
    blocks: Sequence[tuple[AttentionProduct, Tensor]], relevances: Sequence[Tensor], batch: int
) -> Float[Tensor, "batch tokens"]:
    """The mean of those rows of the product of (I + Abar), minus I, that the head reads.

    They are the queries of the last block that have a gradient: the class token alone, where it is
    all that is read.
    """
    product, gradient = blocks[-1]
    read = product.by_image(gradient, batch).ne(0).any(dim=-1).any(dim=1).to(gradient.dtype)
    start = read / read.sum(dim=-1, keepdim=True).clamp(min=1)
    # The row of I would give all patches the same, large number, and float32 round off the rest.
    row, own = torch.zeros_like(product.by_image(gradient, batch)[:, 0, 0]), start
    for (product, gradient), relevance in zip(reversed(blocks), reversed(relevances), strict=True):
        mixed = product.by_image((gradient * relevance).clamp(min=0), batch).mean(dim=1)
        row = row + torch.einsum("bq,bqk->bk", own, mixed)
        if mixed.shape[1] != mixed.shape[2]:
            start = torch.zeros_like(row)
        own = row + start
    return row
