"""Embeddings of single tokens, by the image tower's own last layers."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.clip.output import Embeddings
from shapwrap.clip.zero_shot import ZeroShotClassifier
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_intervention import AttentionIntervention, batch_first
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.token_explainer import TokenLayout
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import in_full_precision, undisturbed

Tokens = Float[Tensor, "batch tokens features"]
Unit = Float[Tensor, "batch items embedding"]
"""Embeddings of unit length."""


class TokenEmbeddings(ABC):
    """How the tokens of a tower become embeddings, each on its own."""

    def __init__(self, layout: TokenLayout):
        self.layout = layout
        self.patches = slice(layout.num_prefix, None)
        self.read = slice(0, 1)
        """The tokens that the image's embedding is made of."""

    @abstractmethod
    def run(self, images: Images, intervention: AttentionIntervention) -> Tokens:
        """All tokens after the tower's last attention and what follows it token by token."""

    @abstractmethod
    def embed(self, tokens: Tokens) -> Unit:
        """Each token's embedding, as if the tower read that token alone."""

    def image(self, tokens: Tokens) -> Embeddings:
        """The unit embedding of the image, [B, E]."""
        return self.embed(tokens[:, self.read].mean(dim=1, keepdim=True))[:, 0]

    def of_patches(self, tokens: Tokens) -> Unit:
        """The embedding of each patch."""
        return self.embed(tokens[:, self.patches])


class TransformerEmbeddings(TokenEmbeddings):
    """Final norm and projection of a vision transformer."""

    def __init__(self, layout: TokenLayout, backbone: TokenBackbone):
        super().__init__(layout)
        self.backbone = backbone

    def run(self, images: Images, intervention: AttentionIntervention) -> Tokens:
        """Through blocks and final norm, where that comes before pooling."""
        with intervention:
            return self.backbone.original_tokens(images)

    def embed(self, tokens: Tokens) -> Unit:
        """Through what is left of norm and projection."""
        embedded = self.backbone.pre_logits(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        with without_autocast(tokens):
            return functional.normalize(in_full(embedded), dim=-1)


class PooledEmbeddings(TokenEmbeddings):
    """The output projection of an attention that pools a feature map, first token first."""

    def __init__(self, layout: TokenLayout, tower: Any):
        super().__init__(layout)
        self.tower = tower

    def run(self, images: Images, intervention: AttentionIntervention) -> Tokens:
        """Through the pooling, all of whose queries are kept."""
        with intervention:
            self.tower(images)
        projected = intervention.layers[-1].projected
        if projected is None:
            raise UnsupportedBackboneError(
                f"{type(self.tower).__name__} pools its feature map without an output projection; "
                "expected attention pooling as in CLIP's ResNet."
            )
        return batch_first(projected, len(images))

    def embed(self, tokens: Tokens) -> Unit:
        """They are embeddings already."""
        with without_autocast(tokens):
            return functional.normalize(in_full(tokens), dim=-1)


def token_embeddings(
    model: ExplainedModel, classifier: ZeroShotClassifier, images: Images, layout: TokenLayout
) -> TokenEmbeddings:
    """How this tower embeds single tokens, once the image's embedding is proved to be one.

    Args:
        model: The classifier, with its parts.
        classifier: The image-text model.
        images: Of the size that is asked for; one of them is run.
        layout: Of its tokens.

    Raises:
        UnsupportedBackboneError: The embedding is not that of the class token, or of the mean of
            the patches, through layers that see no other token.
    """
    backbone = model.backbone
    if layout.pools:
        found: TokenEmbeddings = PooledEmbeddings(layout, classifier.tower)
        choices = [found.read]
    elif isinstance(backbone, TokenBackbone) and not layout.pooled_by_attention:
        found = TransformerEmbeddings(layout, backbone)
        choices = [slice(0, 1)] if layout.num_prefix else []
        choices.append(found.patches)
    else:
        raise _without_patch_embeddings(classifier)
    with undisturbed(classifier), in_full_precision(classifier), without_autocast(images):
        # Two, since one image of two tokens could be two images of one.
        noise = torch.cat((images[:1], images[:1].flip(-1))).to(backbone.parameter)
        expected = classifier.image_embeddings(noise)
        tokens = found.run(noise, AttentionIntervention())
        for choice in choices:
            found.read = choice
            if torch.allclose(found.image(tokens), expected, rtol=0, atol=1e-4):
                return found
    raise _without_patch_embeddings(classifier)


def _without_patch_embeddings(classifier: ZeroShotClassifier) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"the image tower, {type(classifier.tower).__name__}, does not embed its class token or "
        "the mean of its patches through layers that see no other token, so that single patches "
        "have no embedding in the space of texts; expected a vision transformer with a class token "
        "or average pooling, or CLIP's ResNet. ECLIP, integrated gradients, occlusion and RISE "
        "need no such embeddings."
    )
