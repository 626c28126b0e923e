"""torchvision's VisionTransformer, whose blocks take no attention mask of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Images, PooledFeatures, PreLogits
from shapwrap.backbones.base import Normalization
from shapwrap.backbones.pooled_children import IMAGENET_NORMALIZATION, is_torchvision
from shapwrap.backbones.positions import Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.tokens import TokenBackbone, Tokens, TokenSequence
from shapwrap.masking.attention import AttentionMask


class TorchvisionTokens(TokenBackbone):
    """`conv_proj`, `class_token`, `encoder`, `heads`: each block is replayed with a mask."""

    family = "torchvision tokens"

    model: Any

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("_process_input", "class_token", "encoder", "heads", "image_size")
        return all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding, class token and positions."""
        patches = self.model._process_input(images)
        prefix = self.model.class_token.expand(images.shape[0], -1, -1)
        encoder = self.model.encoder
        tokens = encoder.dropout(torch.cat((prefix, patches), dim=1) + encoder.pos_embedding)
        rows = images.shape[-2] // self.model.patch_size
        return TokenSequence(
            tokens[:, :1], tokens[:, 1:], None, (rows, images.shape[-1] // self.model.patch_size)
        )

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks and the final norm."""
        for block in self.model.encoder.layers:
            tokens = tokens + block.dropout(_attend(block, block.ln_1(tokens), mask))
            tokens = tokens + block.mlp(block.ln_2(tokens))
        return self.model.encoder.ln(tokens)

    def original_tokens(self, images: Images) -> Tokens:
        """The encoder's output for the model's own input sequence."""
        patches = self.model._process_input(images)
        prefix = self.model.class_token.expand(images.shape[0], -1, -1)
        return self.model.encoder(torch.cat((prefix, patches), dim=1))

    def prefix_parameters(self) -> list[nn.Parameter]:
        """The class token."""
        return [self.model.class_token]

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """All layers of `heads` but the last."""
        for layer in list(self.model.heads.children())[:-1]:
            pooled = layer(pooled)
        return pooled

    def classifiers(self) -> Sequence[nn.Module]:
        """The last layer of `heads`."""
        return [m for m in list(self.model.heads.children())[-1:] if not isinstance(m, nn.Identity)]

    def ignores_patches(self, images: Images) -> bool:
        """Whether the model's output is its head on the class token, as torchvision's is."""
        hidden = self.pre_logits(self.original_tokens(images)[:, 0])
        return torch.allclose(self.original(images)[0], hidden, rtol=1e-4, atol=1e-5)

    def image_size(self) -> tuple[int, int]:
        """The one size that the model accepts."""
        return self.model.image_size, self.model.image_size

    def normalization(self) -> Normalization | None:
        """ImageNet's statistics, which all of torchvision's own weights use."""
        return IMAGENET_NORMALIZATION if is_torchvision(self.model) else None


def _attend(block: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    attention = block.self_attention
    blocked = None
    if mask is not None:
        batch, length = tokens.shape[:2]
        shape = (batch, attention.num_heads, length, length)
        # nn.MultiheadAttention wants [B * heads, T, T], True where attention is forbidden.
        blocked = (~mask).expand(shape).flatten(0, 1)
    return attention(tokens, tokens, tokens, need_weights=False, attn_mask=blocked)[0]


register_backbone(TorchvisionTokens, Preference.TOKENS)
