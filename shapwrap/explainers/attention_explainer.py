"""Base of the methods that read the attention of a vision transformer."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import ArgumentError, ShapwrapError
from shapwrap.explainers.attention_pass import AttentionPass, attention_pass
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.explicit_attention import Weights
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import undisturbed

ANY_NUMBER = range(sys.maxsize)
MOST_PREFIX_TOKENS = 16
"""More, where nothing tells their number, are taken for a sign that the patch grid is another."""
Relevance = Callable[[Weights, Weights], Float[Tensor, "batch queries keys"]]
"""Of attention weights and their gradient: how much each query takes from each key."""


class AttentionExplainer(Explainer):
    """A method that needs softmax(Q K^T) V over all tokens in every block.

    One forward and one backward pass; of timm, torchvision, open_clip and other models alike, plain
    or wrapped. Where the method follows attention back from the output, it starts at the tokens
    that the head reads: the class token, the mean over all patches (or class and distillation
    token) where it reads several, or the attention of the pooling where the head pools by
    attention. A wrapped model reads its patches, all in equal shares.

    Args:
        model: A vision transformer, wrapped or plain, or a function that runs one.
        grid: Rows and columns of its patches; needed where the library cannot tell.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.
    """

    any_grid = False

    def __init__(self, model: Model, *, grid: Grid | None = None, chunk_size: int = 64):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        self._given_grid = grid

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """The map of each image.

        Raises:
            UnsupportedBackboneError: Windows, several resolutions, attention computed in another
                way, tokens without a residual stream, a head that reads no token.
            ArgumentError: The patch grid is not known, or `grid` is not that of the tokens.
        """
        grid, prefix = self._layout(images)
        chunks = zip(images.split(self.chunk_size), target.split(self.chunk_size), strict=True)
        maps = []
        for part, classes in chunks:
            seen = attention_pass(self.model, part, classes, grid[0] * grid[1], prefix)
            with without_autocast(images):
                maps.append(self.map_of(seen))
        return Attribution(torch.cat(maps), grid)

    @abstractmethod
    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """The method itself."""

    def _layout(self, images: Images) -> tuple[Grid, Sequence[int]]:
        """The patch grid, and how many tokens may come before the patches."""
        try:
            backbone = self.model.backbone
        except ShapwrapError:
            # Whoever passes the grid of a model of their own says how many patches there are.
            return self.model.grid_of(images), ANY_NUMBER
        if not isinstance(backbone, TokenBackbone):
            few = range(MOST_PREFIX_TOKENS + 1)
            return self.model.grid_of(images), few if self._given_grid is None else ANY_NUMBER
        with undisturbed(backbone.model):
            sequence = backbone.embed(images[:1].to(backbone.parameter))
        if self._given_grid not in (None, sequence.grid):
            raise ArgumentError(
                f"grid is {self._given_grid}; the tokens of this model form {sequence.grid}, and "
                f"{self.name} has one value a token. Leave grid out."
            )
        # A wrapped model may leave its prefix out of the sequence.
        wrapped = [] if self.model.wrapped is None else [0]
        return sequence.grid, [*wrapped, sequence.prefix.shape[1]]


def read_row(seen: AttentionPass, relevance: Relevance) -> Float[Tensor, "batch tokens"]:
    """How much the head takes from each token of the last block."""
    pooling = seen.pooling
    if pooling is None:
        return seen.read
    taken = relevance(pooling.weights, pooling.gradient)
    row = torch.einsum("bq,bqk->bk", pooling.read, taken)
    return torch.nn.functional.pad(row, (seen.read.shape[1] - row.shape[1], 0))


def positive_relevance(weights: Weights, gradient: Weights) -> Float[Tensor, "batch queries keys"]:
    """Mean over heads of the positive part of weight times gradient."""
    return (weights * gradient).clamp(min=0).mean(dim=1)
