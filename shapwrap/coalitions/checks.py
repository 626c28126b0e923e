"""Checks of coalitions that a user passes in, and what can be read off them."""

import torch
from torch import Tensor

from shapwrap._types import Pairing
from shapwrap.errors import ArgumentError, CoalitionError, CoalitionTypeError


def check_coalitions(coalitions: Tensor, batch: int, num_patches: int) -> None:
    """Raise unless `coalitions` is a bool tensor of shape [batch, S, num_patches].

    Raises:
        CoalitionTypeError: Not a boolean tensor.
        CoalitionError: Wrong shape.
    """
    if not isinstance(coalitions, Tensor) or coalitions.dtype != torch.bool:
        came = coalitions.dtype if isinstance(coalitions, Tensor) else type(coalitions).__name__
        raise CoalitionTypeError(
            f"coalitions are {came}; expected a torch.bool tensor, True where a patch is present. "
            "Use sample_coalitions(...), or coalitions.bool()."
        )
    expected = (batch, num_patches)
    if (
        coalitions.ndim != 3
        or (coalitions.shape[0], coalitions.shape[2]) != expected
        or coalitions.shape[1] == 0
    ):
        raise CoalitionError(
            f"coalitions have shape {tuple(coalitions.shape)}; expected [B, S, N] = "
            f"[{batch}, S >= 1, {num_patches}] for these images. "
            f"Draw them with sample_coalitions({batch}, {num_patches})."
        )


def are_complement_pairs(coalitions: Tensor) -> bool:
    """Whether coalition 2i + 1 is the complement of coalition 2i, everywhere.

    On a CUDA tensor this waits for the device.
    """
    if coalitions.shape[1] % 2:
        return False
    return torch.equal(coalitions[:, 0::2], ~coalitions[:, 1::2])


def are_complements_across(coalitions: Tensor) -> bool:
    """Whether those of image 2i + 1 are the complements of those of image 2i, two images at least.

    On a CUDA tensor this waits for the device.
    """
    second = coalitions[1::2]
    return len(second) > 0 and torch.equal(coalitions[0::2][: len(second)], ~second)


def resolve_pairing(coalitions: Tensor, paired: Pairing | str | None) -> Pairing:
    """How the coalitions are paired: as said, or looked up.

    Raises:
        ArgumentError: No pairing.
        CoalitionError: Said to be pairs, and seen not to be.
    """
    if paired == "across":
        return _checked_across(coalitions)
    if not isinstance(paired, bool | None):
        raise ArgumentError(f"paired is {paired!r}; expected True, False, 'across' or None.")
    if paired and coalitions.shape[1] % 2:
        raise CoalitionError(
            f"paired=True with {coalitions.shape[1]} coalitions an image; pairs need an even "
            "number. Leave paired=None to have it looked up."
        )
    if torch.compiler.is_compiling():
        # Looking would break the graph; single passes are right for any coalitions.
        return bool(paired)
    looked_at = paired is None or (paired and coalitions.device.type == "cpu")
    are_pairs = are_complement_pairs(coalitions) if looked_at else bool(paired)
    if paired and not are_pairs:
        raise CoalitionError(
            "paired=True, but coalition 2i + 1 is not the complement of coalition 2i; draw them "
            "with sample_coalitions(..., paired=True), or leave paired=None."
        )
    if paired is None and not are_pairs and are_complements_across(coalitions):
        return "across"
    return are_pairs


def _checked_across(coalitions: Tensor) -> Pairing:
    if len(coalitions) < 2:
        # Nobody to be paired with.
        return False
    looked_at = coalitions.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not are_complements_across(coalitions):
        raise CoalitionError(
            "paired='across', but the coalitions of image 2i + 1 are not the complements of those "
            "of image 2i; draw them with sample_coalitions(..., paired='across'), or leave "
            "paired=None."
        )
    return "across"
