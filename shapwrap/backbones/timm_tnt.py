"""timm's TNT: attention among the pixels of each patch, and among the patches."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.backbones.positions import Places, Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import EncodedTokens, Tokens, TokenSequence
from shapwrap.masking.attention import AttentionMask


class TimmTnt(TimmTokens):
    """`pixel_embed` and blocks with an inner and an outer attention.

    A token holds the vector of its patch and then those of its pixels, which no other patch sees.
    """

    family = "timm tokens, TNT"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("pixel_embed", "pixel_pos", "patch_pos", "cls_token", "blocks", "norm")
        return TimmMaps.recognises(model) and all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Vectors of patches and pixels, with positions; the class token has no pixels."""
        model: Any = self.trunk
        self._check_divisible(images)
        pixels = rearrange(
            model.pixel_embed(images, model.pixel_pos), "(b n) p d -> b n (p d)", b=images.shape[0]
        )
        patches = model.norm2_proj(model.proj(model.norm1_proj(pixels)))
        tokens = torch.cat((model.cls_token.expand(images.shape[0], -1, -1), patches), dim=1)
        tokens = model.pos_drop(tokens + model.patch_pos)
        tokens = torch.cat((tokens, functional.pad(pixels, (0, 0, 1, 0))), dim=-1)
        positions = Places.of_whole_sequence(1, patches.shape[1], tokens.device)
        height, width = self._patch_embedding().patch_size
        grid = (images.shape[-2] // height, images.shape[-1] // width)
        return TokenSequence(tokens[:, :1], tokens[:, 1:], positions, grid)

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> EncodedTokens:
        """All blocks and the final norm, of the patches' own vectors."""
        model: Any = self.trunk
        num_prefix = Places.expected(positions, model).num_prefix
        width = model.embed_dim
        outer, inner = tokens[..., :width], tokens[:, num_prefix:, width:]
        for block in model.blocks:
            outer, inner = self._run(_block, block, outer, inner, num_prefix, mask)
        return model.norm(outer)

    def image_size(self) -> tuple[int, int]:
        """The one size that the model accepts."""
        height, width = self.trunk.pixel_embed.img_size
        return height, width

    def _patch_embedding(self) -> Any:
        return self.trunk.pixel_embed


def _block(
    block: Any,
    outer: EncodedTokens,
    inner: Tensor,
    num_prefix: int,
    mask: AttentionMask | None,
) -> tuple[EncodedTokens, Tensor]:
    width = block.norm_in.normalized_shape[0]
    pixels = rearrange(inner, "b n (p d) -> (b n) p d", d=width)
    pixels = pixels + block.drop_path(block.attn_in(block.norm_in(pixels)))
    pixels = pixels + block.drop_path(block.mlp_in(block.norm_mlp_in(pixels)))
    inner = pixels.reshape(inner.shape)
    if block.norm2_proj is None:
        told = block.proj(block.norm1_proj(pixels).reshape(inner.shape))
    else:
        told = block.norm2_proj(block.proj(block.norm1_proj(inner)))
    outer = torch.cat((outer[:, :num_prefix], outer[:, num_prefix:] + told), dim=1)
    outer = outer + block.drop_path(_attention(block.attn_out, block.norm_out(outer), mask))
    return outer + block.drop_path(block.mlp(block.norm_mlp(outer))), inner


def _attention(attention: Any, tokens: EncodedTokens, mask: AttentionMask | None) -> EncodedTokens:
    queries, keys = rearrange(
        attention.qk(tokens), "b t (two h d) -> two b h t d", two=2, h=attention.num_heads
    )
    values = rearrange(attention.v(tokens), "b t (h d) -> b h t d", h=attention.num_heads)
    attended = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )
    return attention.proj_drop(attention.proj(attended.transpose(1, 2).flatten(2)))


register_backbone(TimmTnt, Preference.TOKENS)
