"""Explanations and games of image-text pairs, from the patches' embeddings."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from shapwrap._types import CoalitionValues, PatchEmbeddings
from shapwrap.clip.output import Embeddings, similarities
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation
from shapwrap.wrapper import ShapleyWrapper


class Pairs(NamedTuple):
    """Which images are explained with which texts."""

    images: Int[Tensor, " rows"]
    texts: Int[Tensor, " rows"]
    all: bool = False
    """Whether these are all images with all texts."""


def matched_pairs(pairs: str, embeddings: PatchEmbeddings, text_features: Embeddings) -> Pairs:
    """Image i with text i, or with the only text; or with its best text; or with every text.

    Raises:
        ArgumentError: Not one text an image for matching pairs, or an unknown word.
    """
    num_images, num_texts = len(embeddings), len(text_features)
    images = torch.arange(num_images, device=embeddings.device)
    texts = torch.arange(num_texts, device=embeddings.device)
    if pairs == "best":
        return Pairs(images, similarities(embeddings.sum(dim=1), text_features).argmax(dim=1))
    if pairs == "all":
        return Pairs(images.repeat_interleave(num_texts), texts.repeat(num_images), True)
    if pairs != "matching":
        raise ArgumentError(f"pairs is {pairs!r}; expected 'matching', 'best' or 'all'.")
    if num_texts not in (1, num_images):
        raise ArgumentError(
            f"there are {num_images} images and {num_texts} texts; matching pairs take one text an "
            "image, or one text for all. Use pairs='best' for each image's best text, pairs='all' "
            "for every image with every text."
        )
    return Pairs(images, texts.expand(num_images) if num_texts == 1 else texts, False)


def explain_pairs(
    tower: ShapleyWrapper,
    images: Tensor,
    embeddings: PatchEmbeddings,
    texts: Embeddings,
    pairs: Pairs,
    names: Sequence[str] | None,
    *,
    contrast: bool,
    all_classes: bool = False,
) -> Explanation:
    """One row a pair, its classes being the texts; no embedding is copied for a further text.

    Args:
        tower: The image tower.
        images: What is explained, [B, C, H, W].
        embeddings: Unit embeddings of their patches over N, [B, N, E].
        texts: Unit embeddings [T, E].
        pairs: Which rows there are.
        names: The texts as strings, where known.
        contrast: Take the mean over texts off.
        all_classes: Keep the values of all texts, [rows, N, T].

    Raises:
        ArgumentError: A contrast with one text.
    """
    if contrast and len(texts) < 2:
        raise ArgumentError("contrast=True came with one text; expected several to compare.")
    texts = texts.to(embeddings.dtype)
    asked = texts - texts.mean(dim=0) if contrast else texts
    if pairs.all:
        values = torch.einsum("bnd,td->btn", embeddings, asked).flatten(0, 1)
    else:
        values = torch.einsum("bnd,bd->bn", embeddings, asked[pairs.texts])
    every = torch.einsum("bnd,td->bnt", embeddings, asked)[pairs.images] if all_classes else None
    return Explanation(
        values=values,
        logits=similarities(embeddings.sum(dim=1), texts)[pairs.images],
        target=pairs.texts,
        grid=tower.grid_of(images),
        image_size=(images.shape[-2], images.shape[-1]),
        contrast=contrast,
        class_names=names,
        normalization=tower.normalization,
        covered=tower.covered(images),
        all_values=every,
        unit="similarity",
    )


class MatchedModel:
    """An image tower whose classes are texts, as the games of `shapwrap.values` play it."""

    def __init__(self, tower: ShapleyWrapper, texts: Embeddings):
        self._tower = tower
        self._texts = texts

    def value(self, images: Tensor, coalitions: Tensor) -> CoalitionValues:
        """v(s) for each text, [B, S, T], similarities."""
        return similarities(self._tower.value(images, coalitions), self._texts)

    def modules(self) -> Iterator[nn.Module]:
        """Those of the tower."""
        return self._tower.modules()
