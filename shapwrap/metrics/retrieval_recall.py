"""Retrieval: whether the right image is among the first for a text, and the other way round."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.metrics.candidates import DIRECTIONS, Candidates, checked_ks
from shapwrap.metrics.protocol import ItemScores, Protocol

QUERIES = {"t2i": "texts", "i2t": "images"}
"""What is asked with, by direction."""


class RetrievalScores(ItemScores):
    """1 where a query finds the right one among the first k, else 0, by direction and k."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        places: Mapping[str, Tensor],
        chance: Mapping[str, float],
        protocol: Protocol,
    ):
        super().__init__(values, protocol=protocol)
        self.places = dict(places)
        """Place of the first right one for each query, int64, 1 for the first, by direction."""
        self.chance = dict(chance)
        """Recall of a random order, by metric."""

    def _item(self, metric: str) -> str:
        return f"{QUERIES[metric[:3]]}, chance {self.chance[metric]:.4f}"


@torch.no_grad()
def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | Sequence[int],
    *,
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 1024,
) -> RetrievalScores:
    """Recall at k of text-to-image and image-to-text retrieval.

    A mapping with float tensors `t2i_r@<k>` [T] and `i2t_r@<k>` [I], 1 for a hit and 0 for a miss;
    `.mean()` has the recalls, `.places` where the right ones came, `.chance` the recalls of a
    random order, `.protocol` every choice, in words. A text hits if its own image is among the
    first k of all images; an image hits if any of its texts is among the first k of all texts. Ties
    count against: of similarities that are equal up to rounding the right one comes last.

    Similarities are dot products of the features as they are; nothing is normalised. Those of a
    plain CLIP must be brought to unit length before (`encode_image(x, normalize=True)`); the length
    of a `ShapleyCLIP` image embedding is a part of its similarities.

    Args:
        image_features: Float [I, E].
        text_features: Float [T, E]; of unit length, or long ones win for every image.
        image_of_text: Index of the image of each text, int [T]; every image has at least one text.
        ks: Which k.
        chunk_size: Queries compared with all candidates at a time. Results do not depend on it, up
            to the rounding of the dot products.

    Raises:
        ArgumentError: Features that do not fit each other or are not finite, an image without a
            text, or an option outside its range.

    References:
        Karpathy & Fei-Fei 2015, "Deep Visual-Semantic Alignments for Generating Image
        Descriptions", section 4.1.
    """
    check_at_least("chunk_size", chunk_size, 1)
    wanted = checked_ks(ks)
    found = Candidates.checked(image_features, text_features, image_of_text)
    device = found.images.device
    texts = torch.arange(len(found.texts), device=device)
    images = torch.arange(len(found.images), device=device)
    places = {
        "t2i": torch.cat([found.image_places(part) for part in texts.split(chunk_size)]),
        "i2t": torch.cat(
            [found.caption_places(found.images[part], part) for part in images.split(chunk_size)]
        ),
    }
    right = {"t2i": torch.ones_like(texts), "i2t": found.captions()}
    candidates = {"t2i": len(images), "i2t": len(texts)}
    settings = found.settings() | {"chunks": f"{chunk_size} queries"}
    return RetrievalScores(
        hits(places, wanted),
        places=places,
        chance={
            f"{way}_r@{k}": float(chance(right[way], candidates[way], k).mean())
            for way in DIRECTIONS
            for k in wanted
        },
        protocol=Protocol.of("retrieval", settings),
    )


def hits(places: Mapping[str, Tensor], ks: Sequence[int]) -> dict[str, Tensor]:
    """1 where the place is at most k, else 0, float32, as `<direction>_r@<k>`."""
    return {f"{way}_r@{k}": (place <= k).float() for way, place in places.items() for k in ks}


def chance(
    right: Int[Tensor, " queries"], num_candidates: int, k: int
) -> Float[Tensor, " queries"]:
    """Probability that a random order has one of the right ones among its first k, float64."""
    drawn = torch.arange(min(k, num_candidates)).double()
    wrong = (num_candidates - right).cpu().double()[:, None]
    return 1 - ((wrong - drawn).clamp(min=0) / (num_candidates - drawn)).prod(dim=1)
