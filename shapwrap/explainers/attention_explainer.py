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
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.explainers.explicit_attention import Weights
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import undisturbed

BLOCKS = ("all", "last")
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
        grid, prefix = token_grid(self.model, images, self._given_grid, self.name)
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


def token_grid(
    model: ExplainedModel, images: Images, given: Grid | None, name: str
) -> tuple[Grid, Sequence[int]]:
    """The patch grid, and how many tokens may come before the patches.

    Args:
        model: The model.
        images: Of the size that is asked for.
        given: The grid that the user gave.
        name: Of the method, for the error.

    Raises:
        ArgumentError: The patch grid is not known, or the given one is not that of the tokens.
    """
    try:
        backbone = model.backbone
    except ShapwrapError:
        # Whoever passes the grid of a model of their own says how many patches there are.
        return model.grid_of(images), ANY_NUMBER
    if not isinstance(backbone, TokenBackbone):
        few = range(MOST_PREFIX_TOKENS + 1)
        return model.grid_of(images), few if given is None else ANY_NUMBER
    with undisturbed(backbone.model):
        sequence = backbone.embed(images[:1].to(backbone.parameter))
    if given not in (None, sequence.grid):
        raise ArgumentError(
            f"grid is {given}; the tokens of this model form {sequence.grid}, and "
            f"{name} has one value a token. Leave grid out."
        )
    # A wrapped model may leave its prefix out of the sequence.
    wrapped = [] if model.wrapped is None else [0]
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


def check_blocks(blocks: str) -> None:
    """Raise unless a method knows which blocks to follow attention through.

    Raises:
        ArgumentError: Neither "all" nor "last".
    """
    if blocks not in BLOCKS:
        raise ArgumentError(f"blocks is {blocks!r}; expected one of {', '.join(BLOCKS)}.")
