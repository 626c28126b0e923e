"""What one contrastive training step needs from a wrapped image-text model."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from shapwrap.masking.pooling import without_autocast
from shapwrap.values.output import ShapleyOutput

Embeddings = Float[Tensor, "items embedding"]
"""One embedding an image or a text."""


class ContrastiveOutput(NamedTuple):
    """Result of `clip(image, text, coalitions)`.

    The game is that of embeddings: what coalitions are worth for a text is the product with its
    embedding, for texts of this batch or of any other process. See `for_texts`.
    """

    image_features: Embeddings
    """Sum of the patches' unit embeddings over N, [B, E]; at most of length 1."""
    text_features: Embeddings
    """Unit embeddings of the texts, [T, E]."""
    logit_scale: Tensor
    """What similarities are multiplied with to be logits, already out of its logarithm."""
    logit_bias: Tensor | None
    """What is added to them (SigLIP)."""
    values: Float[Tensor, "batch coalitions embedding"]
    """V(s), the embedding of each masked image, [B, S, E]."""
    estimates: Float[Tensor, "batch coalitions embedding"]
    """What the patches of the whole image say it is, [B, S, E]."""

    def for_texts(self, text_features: Embeddings | None = None) -> ShapleyOutput:
        """Similarities [B, T], values and estimates [B, S, T], for `shapley_loss`.

        Args:
            text_features: Unit embeddings, for example those of all processes; by default those
                of this batch.
        """
        texts = self.text_features if text_features is None else text_features
        return ShapleyOutput(
            similarities(self.image_features, texts),
            similarities(self.values, texts),
            similarities(self.estimates, texts),
        )


def similarities(
    embeddings: Float[Tensor, "*axes embedding"], texts: Embeddings
) -> Float[Tensor, "*axes texts"]:
    """Dot products with every text, in the precision of the embeddings."""
    with without_autocast(embeddings):
        return embeddings @ texts.to(embeddings.dtype).mT
