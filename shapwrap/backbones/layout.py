"""From a backbone's feature map, in whatever layout, to features of patches row by row."""

from typing import Any

from einops import rearrange
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.backbones.base import FeatureMap
from shapwrap.errors import UnsupportedBackboneError


def patches_of_map(feature_map: Tensor, *, channels_last: bool = False) -> FeatureMap:
    """Patch features of a map [B, D, h, w], or [B, h, w, D] with `channels_last`."""
    if not channels_last:
        feature_map = rearrange(feature_map, "b d h w -> b h w d")
    grid = (feature_map.shape[1], feature_map.shape[2])
    return FeatureMap(rearrange(feature_map, "b h w d -> b (h w) d"), grid)


def described(output: object) -> str:
    """What a model returned, for an error."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"


def is_channels_last(model: Any, feature_map: Tensor) -> bool:
    """Whether a map of the model is [B, h, w, D]: it says so, or its last axis has its width."""
    stated = getattr(model, "output_fmt", None)
    if stated is not None:
        return str(getattr(stated, "value", stated)).upper() == "NHWC"
    width = getattr(model, "num_features", None)
    return feature_map.shape[-1] == width and feature_map.shape[1] != width


def patches_of(features: Tensor, size: tuple[int, int], name: str) -> FeatureMap:
    """Patch features of a map [B, D, h, w] or of tokens [B, N, D] without class tokens.

    Raises:
        UnsupportedBackboneError: Neither, or tokens that form no grid.
    """
    if isinstance(features, Tensor) and features.ndim == 4:
        return patches_of_map(features)
    if isinstance(features, Tensor) and features.ndim == 3:
        return FeatureMap(features, grid_of_tokens(features.shape[1], size, name))
    raise UnsupportedBackboneError(
        f"the features of {name} are {described(features)}; expected a map [B, D, h, w], or patch "
        "tokens [B, N, D] without class tokens. Pass features= a function of the images that "
        "returns one."
    )


def grid_of_tokens(num_patches: int, size: tuple[int, int], name: str) -> Grid:
    """The grid of the image's aspect ratio that so many patches form.

    Raises:
        UnsupportedBackboneError: There is none.
    """
    height, width = size
    for rows in range(1, num_patches + 1):
        columns = num_patches // rows
        if rows * columns == num_patches and rows * width == columns * height:
            return rows, columns
    raise UnsupportedBackboneError(
        f"{name} makes {num_patches} patches of {height} x {width} pixels and does not say how "
        "many rows; expected a patch_embed with dynamic_feat_size, or patches that form a grid of "
        "the image's aspect ratio. Pass features= a function that returns a map [B, D, h, w]."
    )
