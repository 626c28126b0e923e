"""Which images are perturbed for which texts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.clip.matching import Pairs
from shapwrap.errors import ArgumentError
from shapwrap.metrics.candidates import Candidates

TOLERATED = 0.05
"""Relative distance of embeddings of one image: half precision and another batch leave as much."""


def matched(
    pairs: Tensor | Sequence[tuple[int, int]] | None,
    found: Candidates,
    num_images: int,
    *,
    images_are_gallery: bool,
) -> Pairs:
    """Rows of the images and of the texts that are measured.

    Args:
        pairs: As a user gives them; None for every text with its image.
        found: The gallery and all texts.
        num_images: How many images there are to perturb.
        images_are_gallery: Whether these are all images, in order.

    Raises:
        ArgumentError: Not int [P >= 1, 2], an index that does not exist, a text with another image
            than its own, or None while images are missing.
    """
    device = found.images.device
    if pairs is None:
        if num_images != len(found.images):
            raise ArgumentError(
                f"pairs is None with {num_images} images for a gallery of {len(found.images)}; "
                "expected all images of the gallery, or pairs=[(image, text), ...]."
            )
        return Pairs(found.image_of_text, torch.arange(len(found.texts), device=device))
    try:
        rows = torch.as_tensor(pairs, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"pairs is {type(pairs).__name__}; expected int [P, 2], (image, text) in each row."
        ) from error
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ArgumentError(f"pairs are {rows.dtype}; expected indices, int64 [P, 2].")
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise ArgumentError(
            f"pairs have shape {tuple(rows.shape)}; expected [P >= 1, 2], (image, text) in each "
            "row."
        )
    for name, indices, num in zip(
        ("image", "text"), rows.T, (num_images, len(found.texts)), strict=True
    ):
        if indices.min() < 0 or indices.max() >= num:
            raise ArgumentError(
                f"pairs have {name} indices from {int(indices.min())} to {int(indices.max())}; "
                f"there are 0 to {num - 1}."
            )
    images, texts = rows.long().T
    if images_are_gallery:
        wrong = (found.image_of_text[texts] != images).nonzero()[:5, 0].tolist()
        if wrong:
            raise ArgumentError(
                f"pairs {wrong} join a text with another image than its own; expected matched "
                "pairs, (image_of_text[text], text)."
            )
    return Pairs(images, texts)


def check_gallery(clean: Float[Tensor, "images width"], pairs: Pairs, found: Candidates) -> None:
    """Raise unless the gallery holds what the encoder makes of the same images.

    Raises:
        ArgumentError: Another width, or embeddings of other images, models or normalisations.
    """
    if clean.shape[1] != found.images.shape[1]:
        raise ArgumentError(
            f"encode_image gives {clean.shape[1]} dimensions, the gallery has "
            f"{found.images.shape[1]}; expected embeddings of one model."
        )
    if clean.device != found.images.device:
        raise ArgumentError(
            f"images lie on {clean.device}, features on {found.images.device}; expected one device."
        )
    own = found.images[found.image_of_text[pairs.texts]]
    apart = (clean[pairs.images].to(own) - own).norm(dim=1)
    wrong = ~(apart <= TOLERATED * own.norm(dim=1))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ArgumentError(
            f"in {int(wrong.sum())} of {len(wrong)} pairs, first pair {row}, encode_image makes "
            f"another embedding of the image than the gallery has (distance {apart[row]:.3g}, "
            f"length {own[row].norm():.3g}); expected gallery embeddings of the same images by the "
            "same encoder, with the same normalisation."
        )
