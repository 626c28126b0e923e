"""open_clip's own VisionTransformer: class token, average or attentional pooling, projection."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.attention_pooling import Part, contributions
from shapwrap.backbones.attentional_pooler import QueryPooling
from shapwrap.backbones.base import Normalization
from shapwrap.backbones.positions import Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.tokens import TokenBackbone, Tokens, TokenSequence
from shapwrap.backbones.tower_whole import embedding_of, pixel_statistics, size_of_tower
from shapwrap.errors import ImageError, UnsupportedBackboneError
from shapwrap.masking.attention import AttentionMask
from shapwrap.masking.batch_norm import evaluation_mode

ProjectedPatches = Float[Tensor, "items patches projected"]
"""Patch features, after the output projection of an attentional pooling where there is one."""


class OpenClipTokens(TokenBackbone):
    """The tower has no classifier: its output, the embedding, is what a head reads."""

    family = "open_clip tokens"

    model: Any

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer")
        parts += ("ln_post", "grid_size", "image_size", "pool_type", "_embeds", "_pool")
        return all(hasattr(model, part) for part in parts)

    def prepare(self, images: Images) -> None:
        """Looks at the pooling.

        Raises:
            UnsupportedBackboneError: Not one embedding an image, or a pooling by other queries
                than the first.
        """
        embedding_of(self.model, self.model(images))
        if self.model.attn_pool is not None and self._pooling() is None:
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} pools by several queries, or in two steps; expected "
                "one attentional pooling whose first query is read (pool_type='tok')."
            )

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding, class token and positions; random patch dropout is left out."""
        model = self.model
        self._check_size(images)
        patches = model.conv1(images)
        grid = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2)
        first = model.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        tokens = torch.cat((first, patches), dim=1)
        tokens = model.ln_pre(tokens + model.positional_embedding.to(tokens.dtype))
        return TokenSequence(tokens[:, :1], tokens[:, 1:], None, grid)

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks, and the final norm where it comes before pooling."""
        forbidden = None if mask is None else _additive(mask, tokens, self._num_heads())
        return self._normed(self.model.transformer(tokens, attn_mask=forbidden))

    def weigh(self, tokens: Tokens, part: Part, num_prefix: int) -> ProjectedPatches:
        """Patch tokens, weighed and projected by the attentional pooling where there is one."""
        pooling = self._pooling()
        if pooling is None:
            return super().weigh(tokens, part, num_prefix)
        # The output projection is affine: done here, the norm that follows reads a mean.
        return pooling.after(contributions(pooling.attention(tokens), part, num_prefix))

    def original_tokens(self, images: Images) -> Tokens:
        """The transformer's output for the tower's own input sequence, normed as in `encode`."""
        return self._normed(self._blocks(images))

    def prefix_parameters(self) -> list[nn.Parameter]:
        """The class token."""
        return [self.model.class_embedding]

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The final norm where it comes after pooling, and the projection."""
        hidden = pooled if self._norm_is_early() else self.model.ln_post(pooled)
        return self.project(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """The projection into the space that images and texts share."""
        return hidden if self.model.proj is None else hidden @ self.model.proj

    def classifiers(self) -> Sequence[nn.Module]:
        """None: the output of a tower is what a head reads."""
        return []

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """The embedding, twice."""
        embedding = embedding_of(self.model, self.model(images))
        return embedding, embedding

    def ignores_patches(self, images: Images) -> bool:
        """Whether noise on the patch tokens leaves what the tower pools as it is."""
        tokens = self._blocks(images)
        noisy = torch.cat((tokens[:, :1], tokens[:, 1:].flip(1) * -2 + 1), dim=1)
        return torch.equal(self.model._pool(tokens)[0], self.model._pool(noisy)[0])

    def image_size(self) -> tuple[int, int]:
        """The size of the positional embedding."""
        return size_of_tower(self.model) or (224, 224)

    def normalization(self) -> Normalization | None:
        """The statistics that the tower states."""
        return pixel_statistics(self.model)

    def _blocks(self, images: Images) -> Tokens:
        with evaluation_mode([self.model.patch_dropout]):
            return self.model.transformer(self.model._embeds(images))

    def _norm_is_early(self) -> bool:
        return self.model.attn_pool is None and not self.model.final_ln_after_pool

    def _normed(self, tokens: Tokens) -> Tokens:
        return self.model.ln_post(tokens) if self._norm_is_early() else tokens

    def _pooling(self) -> QueryPooling | None:
        layer = self.model.attn_pool
        if layer is None or not QueryPooling.recognises(layer):
            return None
        if self.model.pool_type != "tok" or self.model.attn_pool_contrastive is not None:
            return None
        return QueryPooling(layer)

    def _num_heads(self) -> int:
        return self.model.transformer.resblocks[0].attn.num_heads

    def _check_size(self, images: Images) -> None:
        """Positions belong to places: another grid of as many patches would misplace them."""
        (height, width), (rows, columns) = images.shape[-2:], self.model.conv1.kernel_size
        built_for = tuple(self.model.grid_size)
        if (height // rows, width // columns) != built_for or height % rows or width % columns:
            raise ImageError(
                f"{type(self.model).__name__} refuses images of {height} x {width} pixels; "
                f"expected {built_for[0]} x {built_for[1]} patches of {rows} x {columns} pixels. "
                "Resize the images, or build the tower for this size (open_clip: "
                "force_image_size=)."
            )


def _additive(mask: AttentionMask, tokens: Tokens, num_heads: int) -> Tensor:
    """What nn.MultiheadAttention adds to its scores, [B * heads, T, T]."""
    batch, length = tokens.shape[:2]
    # The blocks cast their mask to the tokens' precision, so a boolean one would mean 0 and 1.
    scores = tokens.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return scores.expand(batch, num_heads, length, length).flatten(0, 1)


register_backbone(OpenClipTokens, Preference.TOKENS)
