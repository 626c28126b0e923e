"""Base of the methods that change one thing in a transformer's forward pass and look what comes."""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_checks import OTHERS, check_residual_stream, check_shapes
from shapwrap.explainers.attention_explainer import token_grid
from shapwrap.explainers.attention_recorder import AttentionRecorder
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.masking.batch_norm import without_recomputation


class TokenLayout(NamedTuple):
    """Which tokens a transformer has, and what is added to them."""

    grid: Grid
    num_prefix: int
    """Tokens before the patches."""
    additions: tuple[int, ...]
    """How many residual additions follow each self-attention."""

    pooled_by_attention: bool
    """Whether other queries than the tokens read them, after all blocks."""

    @property
    def num_tokens(self) -> int:
        """Patches, and the tokens before them."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def last(self) -> int:
        """The number of the last self-attention."""
        return len(self.additions) - 1

    @property
    def pools(self) -> bool:
        """Whether there is but one self-attention, which pools a feature map (CLIP's ResNet)."""
        return self.additions == (0,)


class TokenExplainer(Explainer):
    """A method that runs a transformer of global attention with one thing changed.

    Args:
        model: What is explained.
        grid: Rows and columns of its patches; needed where the library cannot tell.
        chunk_size: Images that go through the model at a time, copies included.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.
    """

    any_grid = False
    copies: int = 1
    """How many of each image go through the model together."""
    needs_residual_stream: ClassVar[bool] = False
    """Whether attention must be added to tokens that run from block to block."""

    def __init__(self, model: Model, *, grid: Grid | None = None, chunk_size: int = 64):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        self._given_grid = grid
        self._layouts: dict[tuple[int, int], TokenLayout] = {}

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """The map of each image.

        Raises:
            UnsupportedBackboneError: No global attention, or a tower that the method does not fit.
            ArgumentError: The patch grid is not known, or `grid` is not that of the tokens.
        """
        module = nn.Identity() if self.model.module is None else self.model.module
        maps = []
        with without_recomputation(module):
            layout = self._layout(images)
            size = max(1, self.chunk_size // self.copies)
            for part, classes in zip(images.split(size), target.split(size), strict=True):
                count = len(part)
                if count * self.copies == layout.num_tokens:
                    # One more image tells the axis of the images from that of the tokens.
                    part, classes = torch.cat((part, part[:1])), torch.cat((classes, classes[:1]))
                maps.append(self.maps_of(part, classes, layout)[:count])
        return Attribution(torch.cat(maps), layout.grid)

    @abstractmethod
    def maps_of(
        self, images: Images, target: Int[Tensor, " batch"], layout: TokenLayout
    ) -> Float[Tensor, "batch patches"]:
        """The method itself, on images that run together."""

    def _layout(self, images: Images) -> TokenLayout:
        """Of images of this size; found once.

        Raises:
            UnsupportedBackboneError: No transformer of global attention.
        """
        size = (images.shape[-2], images.shape[-1])
        if size not in self._layouts:
            self._layouts[size] = self._look(images)
        return self._layouts[size]

    def _look(self, images: Images) -> TokenLayout:
        """Runs one image as it is.

        Raises:
            UnsupportedBackboneError: No transformer of global attention.
        """
        grid, prefix = token_grid(self.model, images, self._given_grid, self.name)
        recorder = AttentionRecorder()
        with torch.no_grad(), recorder:
            self.model.logits(images[:1])
        num_prefix = check_shapes(recorder, 1, grid[0] * grid[1], prefix)
        additions = tuple(len(layer.additions) for layer in recorder.layers)
        layout = TokenLayout(grid, num_prefix, additions, bool(recorder.poolings))
        if self.needs_residual_stream:
            if layout.pools:
                raise UnsupportedBackboneError(
                    f"{self.name} follows tokens through blocks; the only attention of this model "
                    f"pools a feature map. {OTHERS}"
                )
            check_residual_stream(recorder.layers)
        return layout
