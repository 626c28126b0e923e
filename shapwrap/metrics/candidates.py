"""Images and texts that are searched for each other: where the right one comes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap.clip.output import similarities
from shapwrap.errors import ArgumentError
from shapwrap.masking.pooling import compute_dtype

DIRECTIONS = ("t2i", "i2t")
"""Images for a text, and texts for an image."""

TIES = "count against: of similarities equal up to rounding the right one comes last"
SIMILARITY = "dot product of the features as they are, in float32 (float64 for float64 features)"


@dataclass(frozen=True)
class Candidates:
    """Features of a gallery of images and of its captions, in one precision."""

    images: Float[Tensor, "images embedding"]
    texts: Float[Tensor, "texts embedding"]
    image_of_text: Int[Tensor, " texts"]
    """The image of each text."""

    @classmethod
    def checked(
        cls, images: object, texts: object, image_of_text: Tensor | Sequence[int]
    ) -> "Candidates":
        """These features, once they are known to fit.

        Raises:
            ArgumentError: Not [I, E] and [T, E], not finite, on two devices, or texts without an
                image and images without a text.
        """
        image_features = checked_features(images, "image_features")
        text_features = checked_features(texts, "text_features")
        if image_features.shape[1] != text_features.shape[1]:
            raise ArgumentError(
                f"image features have {image_features.shape[1]} dimensions, text features "
                f"{text_features.shape[1]}; expected embeddings in one space."
            )
        if image_features.device != text_features.device:
            raise ArgumentError(
                f"image features lie on {image_features.device}, text features on "
                f"{text_features.device}; expected one device."
            )
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        owners = _checked_owners(image_of_text, len(text_features), len(image_features))
        return cls(
            image_features.to(dtype),
            text_features.to(dtype),
            owners.to(image_features.device),
        )

    def image_places(
        self, text: Int[Tensor, " items"], features: Float[Tensor, "items embedding"] | None = None
    ) -> Int[Tensor, " items"]:
        """Place of its own image for each text, 1 for the first of all images.

        Args:
            text: Indices of texts.
            features: What their own images are replaced by, one an item; the gallery's own if None.
        """
        asked, own = self.texts[text], self.image_of_text[text]
        found = similarities(asked, self.images)
        answers = self.images[own] if features is None else features
        if features is None:
            right = found.gather(1, own[:, None])
        else:
            right = (asked * features).sum(dim=1, keepdim=True)
        ahead = (found >= right - rounding(asked, answers)).scatter(1, own[:, None], False)
        return 1 + ahead.sum(dim=1)

    def caption_places(
        self, features: Float[Tensor, "items embedding"], image: Int[Tensor, " items"]
    ) -> Int[Tensor, " items"]:
        """Place of the first right text among all texts, 1 for the first.

        Args:
            features: Of what is asked for.
            image: Indices of the images whose texts are right.
        """
        found = similarities(features, self.texts)
        right = self.image_of_text == image[:, None]
        best, text = found.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True)
        least = best - rounding(features, self.texts[text[:, 0]])
        return 1 + ((found >= least) & ~right).sum(dim=1)

    def captions(self) -> Int[Tensor, " images"]:
        """Number of texts of each image."""
        return torch.bincount(self.image_of_text, minlength=len(self.images))

    def settings(self) -> dict[str, str]:
        """What is compared, for the protocol."""
        few, many = (int(n) for n in self.captions().aminmax())
        captions = f"{few}" if few == many else f"{few} to {many}"
        return {
            "images": f"{len(self.images)}, features of {_lengths(self.images)}",
            "texts": f"{len(self.texts)}, features of {_lengths(self.texts)}",
            "similarity": SIMILARITY,
            "positives": f"T2I: the text's image; I2T: any text of the image, {captions} an image",
            "ties": TIES,
        }


def rounding(
    asked: Float[Tensor, "items embedding"], answers: Float[Tensor, "items embedding"]
) -> Float[Tensor, "items 1"]:
    """By how much products of these pairs may differ and still be equal.

    The same product can come out differently in its last places, by where it stands in a matrix
    and by how many are computed at a time.
    """
    lengths = asked.norm(dim=1, keepdim=True) * answers.norm(dim=1, keepdim=True)
    return 2 * torch.finfo(asked.dtype).eps * asked.shape[1] ** 0.5 * lengths


def checked_ks(ks: Sequence[int]) -> list[int]:
    """Each k once, in order.

    Raises:
        ArgumentError: None, or one that is not an int of at least 1.
    """
    valid = isinstance(ks, Sequence) and not isinstance(ks, str) and len(ks) > 0
    if not valid or not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in ks):
        raise ArgumentError(f"ks is {ks!r}; expected ints of at least 1, such as (1, 5).")
    return sorted(set(ks))


def checked_features(features: object, name: str) -> Float[Tensor, "items embedding"]:
    """The features in full precision, without gradient.

    Raises:
        ArgumentError: Not a finite float tensor [items >= 1, E].
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        came = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise ArgumentError(f"{name} are {came}; expected a float tensor, one embedding a row.")
    if features.ndim != 2 or 0 in features.shape:
        raise ArgumentError(
            f"{name} have shape {tuple(features.shape)}; expected two axes, one embedding a row."
        )
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero()[:5, 0].tolist()
        raise ArgumentError(
            f"{name} hold NaN or infinity, first in rows {bad}; expected finite embeddings. Run "
            "the model in float32, and look at what it was given."
        )
    return features.detach().to(compute_dtype(features))


def _checked_owners(image_of_text: object, num_texts: int, num_images: int) -> Tensor:
    try:
        owners = torch.as_tensor(image_of_text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"image_of_text is {type(image_of_text).__name__}; expected the index of the image of "
            "each text, int64 [T]."
        ) from error
    if owners.is_floating_point() or owners.is_complex() or owners.dtype == torch.bool:
        raise ArgumentError(f"image_of_text is {owners.dtype}; expected indices, int64 [T].")
    if owners.shape != (num_texts,):
        raise ArgumentError(
            f"image_of_text has shape {tuple(owners.shape)}; expected ({num_texts},), the index of "
            "the image of each text."
        )
    owners = owners.long()
    if owners.min() < 0 or owners.max() >= num_images:
        raise ArgumentError(
            f"image_of_text has indices from {int(owners.min())} to {int(owners.max())}; there are "
            f"images 0 to {num_images - 1}."
        )
    without = (torch.bincount(owners, minlength=num_images) == 0).nonzero()[:, 0].tolist()
    if without:
        raise ArgumentError(
            f"{len(without)} images have no text, first {without[:5]}, so nothing is right for "
            "them; expected at least one text an image. Leave these images out."
        )
    return owners


def _lengths(features: Float[Tensor, "items embedding"]) -> str:
    low, high = (float(n) for n in features.norm(dim=1).aminmax())
    return (
        f"length {low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"length {low:.3g} to {high:.3g}"
    )
