"""timm's ConViT: gated positional attention among the patches first, the class token later."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.backbones.positions import Places, Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import Tokens, TokenSequence
from shapwrap.masking.attention import AttentionMask, mask_of_patches


class TimmConvit(TimmTokens):
    """`blocks` with and without `use_gpsa`, `local_up_to_layer` of which see patches alone."""

    family = "timm tokens, ConViT"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("patch_embed", "use_pos_embed", "local_up_to_layer", "cls_token", "blocks", "norm")
        return TimmMaps.recognises(model) and all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding and positions; the class token waits in front."""
        model: Any = self.trunk
        self._check_divisible(images)
        patches = model.patch_embed(images)
        grid = self._token_grid(images, patches.shape[1])
        if model.use_pos_embed:
            patches = patches + model.pos_embed
        patches = model.pos_drop(patches)
        prefix = patches[:, :0]
        if model.cls_token is not None:
            prefix = model.cls_token.expand(images.shape[0], -1, -1)
        positions = Places.of_whole_sequence(prefix.shape[1], patches.shape[1], patches.device)
        return TokenSequence(prefix, patches, positions, grid)

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks, the first ones on the patches alone, and the final norm."""
        model: Any = self.trunk
        places = Places.expected(positions, model)
        num_prefix = places.num_prefix
        prefix, tokens = tokens[:, :num_prefix], tokens[:, num_prefix:]
        among = mask_of_patches(mask, num_prefix)
        index = places.patches - self._num_prefix()
        for layer, block in enumerate(model.blocks):
            if layer == model.local_up_to_layer:
                tokens, among = torch.cat((prefix, tokens), dim=1), mask
            distances = self._distances(block.attn, index) if block.use_gpsa else None
            tokens = self._run(_block, block, tokens, distances, among)
        return model.norm(tokens)

    def _distances(self, attention: Any, index: Tensor) -> Tensor:
        """Offsets of each pair of these patches, [1, N, N, 3]."""
        whole = attention.rel_indices
        if whole.shape[1] != self.trunk.num_patches:
            # The model fills its buffer when it first runs, with whatever number of tokens.
            whole = attention.get_rel_indices(self.trunk.num_patches)
        return whole.index_select(1, index).index_select(2, index)


def _block(
    block: Any, tokens: Tokens, distances: Tensor | None, mask: AttentionMask | None
) -> Tokens:
    attention, normed = block.attn, block.norm1(tokens)
    if distances is None:
        projected = attention.qkv(normed)
    else:
        projected = torch.cat((attention.qk(normed), attention.v(normed)), dim=-1)
    queries, keys, values = rearrange(
        projected, "b t (three h d) -> three b h t d", three=3, h=attention.num_heads
    )
    weights = _softmax(queries @ keys.transpose(-2, -1) * attention.scale, mask)
    if distances is not None:
        scores = rearrange(attention.pos_proj(distances), "1 q k h -> 1 h q k")
        gate = torch.sigmoid(attention.gating_param)[:, None, None]
        weights = (1 - gate) * weights + gate * _softmax(scores, mask)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    attended = (attention.attn_drop(weights) @ values).transpose(1, 2).flatten(2)
    tokens = tokens + block.drop_path(attention.proj_drop(attention.proj(attended)))
    return tokens + block.drop_path(block.mlp(block.norm2(tokens)))


def _softmax(scores: Tensor, mask: AttentionMask | None) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


register_backbone(TimmConvit, Preference.TOKENS)
