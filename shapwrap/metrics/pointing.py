"""The pointing game: whether the strongest pixel, or patch, lies on the object."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation
from shapwrap.masking.pixels import sums_over_patches
from shapwrap.metrics.maps import IGNORE, check_maps, check_masks, is_constant, resized


class Localisation(NamedTuple):
    """One number an image."""

    hit: Float[Tensor, " batch"]
    """1 where the strongest point lies on the object; where points share the largest value, the
    share of them that does."""
    chance: Float[Tensor, " batch"]
    """Probability that a point drawn at random does."""


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float | int = 0) -> Localisation:
    """Hits of the strongest pixel, and what chance would hit; NaN where no object is labelled.

    Ignored pixels can neither be pointed at nor hit.

    Args:
        maps: Float [B, h, w] or [B, H, W]; smaller maps are resized, bilinear, to the masks.
        masks: Int or bool [B, H, W]: 1 object, 0 background, -1 ignored.
        tolerance: Pixels at most this far from the object count as hits (15 in the reference).

    Raises:
        ArgumentError: Shapes or labels that do not fit, values that are not finite, a negative
            tolerance.

    References:
        Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", section 4.1.
    """
    if not 0 <= tolerance < math.inf:
        raise ArgumentError(f"tolerance is {tolerance!r}; expected pixels, at least 0, and finite.")
    checked = check_maps(maps)
    labels = check_masks(masks, checked)
    constant = is_constant(checked)
    drawn = resized(checked, (labels.shape[-2], labels.shape[-1]))
    drawn = torch.where(constant[:, None, None], 0.0, drawn)
    labelled = labels != IGNORE
    return _pointed(
        drawn.flatten(1),
        (near(labels == 1, tolerance) & labelled).flatten(1),
        labelled.flatten(1),
        (labels == 1).flatten(1).any(dim=1),
    )


def localisation(explanation: Explanation, evidence: Tensor) -> Localisation:
    """Hits of the strongest patch, and what chance would hit.

    A patch is on the evidence where at least one of its pixels is.

    Args:
        explanation: Of the class whose evidence is known.
        evidence: Bool [B, H, W], True on the pixels that are evidence.

    Raises:
        ArgumentError: The masks are not those of the explained images.
    """
    expected = (len(explanation.values), *explanation.image_size)
    if evidence.shape != expected or evidence.dtype != torch.bool:
        raise ArgumentError(
            f"evidence is {evidence.dtype} of shape {tuple(evidence.shape)}; expected one mask an "
            f"image, torch.bool {expected}."
        )
    height, width = explanation.covered or explanation.image_size
    holds = evidence_patches(evidence[:, :height, :width], explanation.grid)
    holds = holds.to(explanation.values.device)
    everywhere = torch.ones_like(holds)
    return _pointed(explanation.values, holds, everywhere, everywhere.any(dim=1))


def evidence_patches(
    evidence: Bool[Tensor, "batch height width"], grid: Grid
) -> Bool[Tensor, "batch patches"]:
    """Patches that hold at least one pixel of evidence."""
    return sums_over_patches(evidence.float(), grid) > 0


def near(
    objects: Bool[Tensor, "batch height width"], tolerance: float | int
) -> Bool[Tensor, "batch height width"]:
    """Pixels whose distance to the nearest pixel of the object is at most `tolerance`."""
    reach = int(tolerance)
    if reach == 0:
        return objects
    offsets = torch.arange(-reach, reach + 1, device=objects.device)
    disc = offsets[:, None] ** 2 + offsets**2 <= tolerance**2
    kernel = rearrange(disc.float(), "h w -> 1 1 h w")
    return functional.conv2d(objects[:, None].float(), kernel, padding=reach)[:, 0] > 0.5


def _pointed(
    values: Float[Tensor, "batch points"],
    on_object: Bool[Tensor, "batch points"],
    allowed: Bool[Tensor, "batch points"],
    has_object: Bool[Tensor, " batch"],
) -> Localisation:
    candidates = values.masked_fill(~allowed, -torch.inf)
    strongest = (candidates == candidates.amax(dim=1, keepdim=True)) & allowed
    shares = [
        (chosen & on_object).sum(dim=1) / chosen.sum(dim=1) for chosen in (strongest, allowed)
    ]
    hit, chance = (torch.where(has_object, share, torch.nan).float() for share in shares)
    return Localisation(hit, chance)
