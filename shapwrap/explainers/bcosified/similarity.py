"""How well images match texts: the cosine of the pooled embedding, or a mean over places."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.errors import ArgumentError
from shapwrap.explainers.bcosified.dynamic import Dynamic
from shapwrap.explainers.bcosified.layers import SMALLEST
from shapwrap.explainers.bcosified.tower import BcosifiedTower, Encoded
from shapwrap.masking.pooling import compute_dtype, without_autocast

Reading = Literal["pooled", "attn_unpool", "attn_unpool_map"]
"""What is explained, and where: pixels of the pooled cosine, pixels of the mean over places, or the
places themselves."""


class BcosifiedSimilarity(nn.Module, Dynamic):
    """Images to similarities with fixed texts, [B, T].

    Args:
        tower: A B-cosified tower.
        texts: Unit embeddings, [T, E].
        reading: "pooled": cos(e, t) of the pooled embedding e. Otherwise the mean over places p of
            c_p |c_p|^(cosine_power - 1), c_p = cos(e_p, t).
        cosine_power: See there; above 1 the best places count for more.

    Raises:
        ArgumentError: An unknown reading, or a power below 1, or one where none is read.
    """

    def __init__(
        self,
        tower: BcosifiedTower,
        texts: Float[Tensor, "texts embedding"],
        *,
        reading: Reading | str = "pooled",
        cosine_power: float = 1.0,
    ):
        super().__init__()
        if reading not in get_args(Reading):
            raise ArgumentError(f"reading is {reading!r}; expected one of {get_args(Reading)}.")
        if not 1 <= cosine_power < math.inf:
            raise ArgumentError(f"cosine_power is {cosine_power}; expected 1 or more, and finite.")
        if reading == "pooled" and cosine_power != 1:
            raise ArgumentError(
                f"cosine_power is {cosine_power} with reading='pooled', which has one cosine an "
                "image; expected 1. Use reading='attn_unpool'."
            )
        self.tower = tower
        self.reading = reading
        self.cosine_power = cosine_power
        self.texts: Tensor
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, images: Images) -> Float[Tensor, "batch texts"]:
        """Similarities with every text."""
        return self.of_encoded(self.tower.encode(images))

    def of_encoded(self, encoded: Encoded) -> Float[Tensor, "batch texts"]:
        """The same for images in six channels; linear in them in explanation mode."""
        if self.reading == "pooled":
            return self._cosines(self.tower.embed(encoded))
        return self.of_places(encoded).mean(dim=1)

    def of_places(self, encoded: Encoded) -> Float[Tensor, "batch places texts"]:
        """c_p |c_p|^(cosine_power - 1) of each place of the last map and each text."""
        cosines = self._cosines(self.tower.embed_places(encoded))
        if self.cosine_power == 1:
            return cosines
        weights = cosines.abs().clamp(min=SMALLEST) ** (self.cosine_power - 1)
        return cosines * (weights.detach() if self.detached else weights)

    def _cosines(
        self, embeddings: Float[Tensor, "*places embedding"]
    ) -> Float[Tensor, "*places texts"]:
        with without_autocast(embeddings):
            embeddings = embeddings.to(compute_dtype(embeddings))
            lengths = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
            lengths = lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
            if self.detached:
                # With its gradient, that of a cosine would be no linear map of the image: what
                # pixels contribute would sum to zero, whatever the cosine.
                lengths = lengths.detach()
            return embeddings @ self.texts.to(embeddings.dtype).mT / lengths
