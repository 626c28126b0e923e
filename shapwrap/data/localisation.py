"""Whether an explanation points at the evidence, where the evidence is known."""

from typing import NamedTuple

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation


class Localisation(NamedTuple):
    """One number an image."""

    hit: Float[Tensor, " batch"]
    """1 where the patch with the largest value holds evidence (the pointing game)."""
    chance: Float[Tensor, " batch"]
    """Probability that a patch drawn at random does."""


def localisation(
    explanation: Explanation, evidence: Bool[Tensor, "batch height width"]
) -> Localisation:
    """Hits of the strongest patch, and what chance would hit.

    Args:
        explanation: Of the class whose evidence is known.
        evidence: True on the pixels that are evidence.

    Raises:
        ArgumentError: The masks are not those of the explained images.
    """
    if evidence.shape != (len(explanation.values), *explanation.image_size):
        raise ArgumentError(
            f"evidence has shape {tuple(evidence.shape)}; expected one mask an image, "
            f"{(len(explanation.values), *explanation.image_size)}."
        )
    holds = evidence_patches(evidence, explanation.grid).to(explanation.values.device)
    strongest = explanation.values.argmax(dim=1, keepdim=True)
    return Localisation(holds.gather(1, strongest)[:, 0].float(), holds.float().mean(dim=1))


def evidence_patches(
    evidence: Bool[Tensor, "batch height width"], grid: Grid
) -> Bool[Tensor, "batch patches"]:
    """Patches that hold at least one pixel of evidence."""
    cells = functional.adaptive_max_pool2d(evidence[:, None].float(), grid)
    return rearrange(cells, "b 1 rows columns -> b (rows columns)") > 0
