"""A finer patch grid for a convolutional backbone: its last stages at stride 1."""

from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.last_level import last_level
from shapwrap.backbones.stride_one import LayerCall, StrideChange, restore, to_stride_one
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import GridError


def densify(backbone: Backbone, images: Images, grid: Grid) -> list[StrideChange]:
    """Set the strides of the last stages to 1 until the map has `grid`; returns the changes.

    Parameters stay as they are; the receptive field and the logits do not.

    Raises:
        GridError: No number of last stages at stride 1 gives this grid, with the layer that
            stands in the way; the model is unchanged.

    References:
        Fan, Yang & Ma 2026, "modify the stride parameter from 2 to 1 ... in stage 4".
    """
    native = backbone.features(images).grid
    if isinstance(backbone, TokenBackbone):
        raise GridError(
            f"grid={grid} is out of reach for {type(backbone.model).__name__}: its patch embedding "
            f"makes {native} tokens of these images. Use larger images with image_size=, or a "
            "model with smaller patches."
        )
    changes: list[StrideChange] = []
    try:
        _refine(backbone, images, native, grid, changes)
    except GridError as error:
        restore(changes)
        raise GridError(_cannot(backbone, images, native, grid, str(error))) from error
    except BaseException:
        restore(changes)
        raise
    return changes


def _refine(
    backbone: Backbone, images: Images, native: Grid, grid: Grid, changes: list[StrideChange]
) -> None:
    """Level by level, until the map has `grid`; what was changed is in `changes` at any time."""
    height, width = images.shape[-2:]
    if grid[0] > height or grid[1] > width:
        raise GridError("that is more than one patch a pixel")
    reached = [native]
    while reached[-1] != grid:
        if reached[-1][0] > grid[0] or reached[-1][1] > grid[1]:
            passed = ", ".join(map(str, reached[1:]))
            raise GridError(f"its finer grids are {passed}, …" if passed else "that is coarser")
        reached.append(_one_level(backbone, images, reached[-1], changes))


def _one_level(
    backbone: Backbone, images: Images, current: Grid, changes: list[StrideChange]
) -> Grid:
    """Adds the changes that make the next finer map, and returns its size."""
    failure: GridError | None = None
    start = len(changes)
    for level in last_level(backbone, images, current, {change.layer for change in changes}):
        try:
            _to_stride_one_together(level, changes)
            finer = backbone.features(images).grid
            if finer[0] < current[0] or finer[1] < current[1] or finer == current:
                raise GridError(f"the map did not grow, but went from {current} to {finer}")
            return finer
        except Exception as error:
            # Whatever the model's own code raises on a map that it was not built for.
            restore(changes[start:])
            del changes[start:]
            if failure is None:
                failed = isinstance(error, GridError)
                failure = error if failed else GridError(_why_it_fails(level, error))
                failure.__cause__ = None if failed else error
    raise failure or GridError("no layer makes its map")


def _to_stride_one_together(level: list[LayerCall], changes: list[StrideChange]) -> None:
    """All layers of a level, whose outputs meet in a sum or a concatenation."""
    offsets: list[Grid] = []
    for call in level:
        change, offset = to_stride_one(call)
        changes.append(change)
        offsets.append(offset)
    for index, call in enumerate(level, start=-len(level)):
        if offsets[index] == max(offsets):
            continue
        # What meets must still see the same place.
        changes[index].undo()
        changes[index], offset = to_stride_one(call, leading=True)
        if offset != max(offsets):
            raise GridError(
                f"{call} runs beside a layer that pads more before its input at stride 1, so "
                "their outputs would no longer see the same place"
            )


def _why_it_fails(level: list[LayerCall], error: Exception) -> str:
    return (
        f"with {' and '.join(map(str, level))} at stride 1 its forward pass fails "
        f"({type(error).__name__}: {error}); a model that also downsamples outside of such layers, "
        "or has windows or positions for one size of its map, keeps that size"
    )


def _cannot(backbone: Backbone, images: Tensor, native: Grid, grid: Grid, why: str) -> str:
    height, width = images.shape[-2:]
    return (
        f"grid={grid} is out of reach for {type(backbone.model).__name__} at {height} x {width} "
        f"pixels, whose own grid is {native}: {why}. Each step of the last stage to stride 1 "
        "doubles rows and columns; leave grid=None for the backbone's own grid."
    )
