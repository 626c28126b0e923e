"""A finer patch grid for a convolutional backbone: its last stages at stride 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import GridError


class StrideChange(NamedTuple):
    """One layer whose stride was set to 1, and what it was."""

    layer: nn.Conv2d
    stride: tuple[int, ...]

    def undo(self) -> None:
        """Give the layer its stride back."""
        self.layer.stride = self.stride


class _Downsampling(NamedTuple):
    layer: nn.Module
    output: Grid


def densify(backbone: Backbone, images: Images, grid: Grid) -> list[StrideChange]:
    """Set the strides of the last stages to 1 until the map has `grid`; returns the changes.

    Parameters stay as they are; the receptive field and the logits do not.

    Raises:
        GridError: No number of last stages at stride 1 gives this grid; the model is unchanged.

    References:
        Fan, Yang & Ma 2026, "modify the stride parameter from 2 to 1 ... in stage 4".
    """
    changes: list[StrideChange] = []
    native = current = backbone.features(images).grid
    if isinstance(backbone, TokenBackbone):
        raise GridError(
            f"grid={grid} is out of reach for {type(backbone.model).__name__}: its patch embedding "
            f"makes {native} tokens of these images. Use larger images with image_size=, or a "
            "model with smaller patches."
        )
    try:
        while current != grid:
            if current[0] >= grid[0] or current[1] >= grid[1]:
                raise GridError(_cannot(backbone, images, native, grid, f"the next is {current}"))
            changes += _last_level_to_stride_one(backbone, images, current, native, grid)
            finer = backbone.features(images).grid
            if finer[0] <= current[0] or finer[1] <= current[1]:
                raise GridError(_cannot(backbone, images, native, grid, "the map did not grow"))
            current = finer
    except (GridError, RuntimeError) as error:
        restore(changes)
        if isinstance(error, GridError):
            raise
        raise GridError(
            _cannot(backbone, images, native, grid, f"its forward pass then fails: {error}")
        ) from error
    return changes


def _last_level_to_stride_one(
    backbone: Backbone, images: Images, current: Grid, native: Grid, grid: Grid
) -> list[StrideChange]:
    with _recorded_downsampling(backbone.model) as found:
        backbone.features(images)
    level = [downsampling.layer for downsampling in found if downsampling.output == current]
    if not level:
        raise GridError(_cannot(backbone, images, native, grid, "no strided layer makes the map"))
    changes = []
    for layer in level:
        if not isinstance(layer, nn.Conv2d) or layer.stride != (2, 2):
            restore(changes)
            raise GridError(
                _cannot(
                    backbone,
                    images,
                    native,
                    grid,
                    f"its map is made by {layer}, which is not a convolution of stride 2",
                )
            )
        changes.append(StrideChange(layer, tuple(layer.stride)))
        layer.stride = (1, 1)
    return changes


@contextmanager
def _recorded_downsampling(model: nn.Module) -> Iterator[list[_Downsampling]]:
    """Records the strided layers that run, with the size of what they return."""
    found: list[_Downsampling] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and output.shape[-2:] != inputs[0].shape[-2:]:
            found.append(_Downsampling(layer, (output.shape[-2], output.shape[-1])))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cannot(backbone: Backbone, images: Tensor, native: Grid, grid: Grid, why: str) -> str:
    height, width = images.shape[-2:]
    return (
        f"grid={grid} is out of reach for {type(backbone.model).__name__} at {height} x {width} "
        f"pixels, whose own grid is {native}: {why}. Each step of the last stage to stride 1 "
        "doubles rows and columns; leave grid=None for the backbone's own grid."
    )


def restore(changes: list[StrideChange]) -> None:
    """Give all layers their strides back."""
    for change in changes:
        change.undo()
