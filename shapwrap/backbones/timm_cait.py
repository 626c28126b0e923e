"""timm's CaiT: talking heads among the patches, the class token in blocks of its own at the end."""

from typing import Any

from einops import rearrange
from torch import nn

from shapwrap._types import Images
from shapwrap.backbones.positions import Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import Tokens, TokenSequence
from shapwrap.masking.attention import AttentionMask


class TimmCait(TimmTokens):
    """`blocks` over patches alone; no patch ever sees the class token of `blocks_token_only`."""

    family = "timm tokens, CaiT"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("patch_embed", "pos_embed", "pos_drop", "blocks", "blocks_token_only", "norm")
        return TimmMaps.recognises(model) and all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding and positions, without a prefix."""
        model: Any = self.trunk
        self._check_divisible(images)
        patches = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        return TokenSequence(
            patches[:, :0], patches, None, self._token_grid(images, patches.shape[1])
        )

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks of patches and the final norm."""
        model: Any = self.trunk
        for block in model.blocks:
            tokens = self._run(_block, block, tokens, mask)
        return model.norm(tokens)

    def original_tokens(self, images: Images) -> Tokens:
        """Timm's `forward_features` without the class token."""
        return self._map(images)[:, self._num_prefix() :]

    def unused_parameters(self) -> list[nn.Parameter]:
        """The class token and its blocks, which only a class-token head would read."""
        blocks = self.trunk.blocks_token_only
        if blocks is None:
            return []
        return [self.trunk.cls_token, *blocks.parameters()]


def _block(block: Any, tokens: Tokens, mask: AttentionMask | None) -> Tokens:
    attended = _talking_heads(block.attn, block.norm1(tokens), mask)
    tokens = tokens + block.drop_path(block.gamma_1 * attended)
    return tokens + block.drop_path(block.gamma_2 * block.mlp(block.norm2(tokens)))


def _talking_heads(attention: Any, tokens: Tokens, mask: AttentionMask | None) -> Tokens:
    queries, keys, values = rearrange(
        attention.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=attention.num_heads
    )
    scores = attention.scale * queries @ keys.transpose(-2, -1)
    scores = rearrange(
        attention.proj_l(rearrange(scores, "b h q k -> b q k h")), "b q k h -> b h q k"
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = rearrange(scores.softmax(dim=-1), "b h q k -> b q k h")
    weights = rearrange(attention.proj_w(weights), "b q k h -> b h q k")
    if mask is not None:
        # The bias of proj_w would give weight to tokens that are not there.
        weights = weights.masked_fill(~mask, 0.0)
    attended = (attention.attn_drop(weights) @ values).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(attended))


register_backbone(TimmCait, Preference.TOKENS)
