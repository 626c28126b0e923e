"""Where in a traced run the features of patches may be."""

from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from shapwrap.backbones.base import FeatureMap
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.recording import Recording

MOST_EXTRA_TOKENS = 16
"""More tokens than that beside the patches are no class tokens and registers."""


class Place(NamedTuple):
    """Where patch features are: a map [B, D, h, w], or tokens [B, T, D] made of one."""

    module: nn.Module
    grid_of: nn.Module
    start: int
    """Which token is the first patch; 0 for a map."""


def places_in(record: Recording, size: tuple[int, int]) -> list[Place]:
    """Where patch features may be, in the order in which they were made.

    A module that runs twice says nothing: which of its outputs is meant cannot be told.
    """
    places: list[Place] = []
    grid_of: nn.Module | None = None
    start: int | None = None
    rows = columns = 0
    once = [module for module, times in Counter(record.order).items() if times == 1]
    for module in once:
        output = record.outputs[module]
        if _is_map(output, size):
            height, width = output.shape[-2:]
            # Maps do not grow again; attention between tokens may look like a larger one.
            if grid_of is None or (height <= rows and width <= columns):
                grid_of, start, (rows, columns) = module, None, (height, width)
                places.append(Place(module, module, 0))
        elif grid_of is not None and _are_tokens(output, rows * columns):
            if start is None:
                start = _first_patch(record.inputs.get(module), rows * columns)
            if start is not None:
                places.append(Place(module, grid_of, start))
    return places


def _are_tokens(output: object, num_patches: int) -> bool:
    if not isinstance(output, Tensor) or output.ndim != 3:
        return False
    return 0 <= output.shape[1] - num_patches <= MOST_EXTRA_TOKENS


def _first_patch(tokens: Tensor | None, num_patches: int) -> int | None:
    """Where patches begin, before anything has mixed them: other tokens are equal in all images."""
    if tokens is None or not _are_tokens(tokens, num_patches):
        return None
    of_images = (tokens[0] != tokens[1]).any(dim=1).nonzero()[:, 0]
    start = int(of_images[0]) if len(of_images) else 0
    contiguous = len(of_images) == num_patches == int(of_images[-1]) - start + 1
    return start if contiguous else None


def patches_at(record: Recording, place: Place) -> FeatureMap:
    """Patch features and their grid, as recorded in one run."""
    features = record.outputs[place.module]
    if place.module is place.grid_of:
        return patches_of_map(features)
    rows, columns = record.outputs[place.grid_of].shape[-2:]
    return FeatureMap(features[:, place.start : place.start + rows * columns], (rows, columns))


def _is_map(output: object, size: tuple[int, int]) -> bool:
    """Whether an output is [B, D, h, w] with places that form the image, attention weights not."""
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
        return False
    (rows, columns), (height, width) = output.shape[-2:], size
    # A map of one place has been pooled already; borders may cost a row or a column.
    if rows * columns == 1 or abs(rows * width - columns * height) > max(height, width):
        return False
    weights = bool((output >= 0).all()) and bool(((output.sum(dim=-1) - 1).abs() < 1e-3).all())
    return not weights
