"""timm's BEiT: tables of relative positions in each block, or one for all."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.backbones.positions import PairBias, Places
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_pair_bias import TimmPairBias, attend
from shapwrap.backbones.tokens import Tokens, TokenSequence


class TimmBeit(TimmPairBias):
    """`patch_embed`, `cls_token`, `rel_pos_bias`, and blocks with query and value biases."""

    family = "timm tokens, BEiT"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("patch_embed", "cls_token", "pos_embed", "pos_drop", "rel_pos_bias", "norm")
        blocks = getattr(model, "blocks", None)
        return (
            TimmMaps.recognises(model)
            and all(hasattr(model, part) for part in parts)
            and isinstance(blocks, nn.ModuleList)
            and all(hasattr(getattr(block, "attn", None), "q_bias") for block in blocks)
        )

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding, class token and, where the model has them, absolute positions."""
        model: Any = self.trunk
        self._check_divisible(images)
        patches = model.patch_embed(images)
        grid = self._token_grid(images, patches.shape[1])
        tokens = torch.cat((model.cls_token.expand(images.shape[0], -1, -1), patches), dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        tokens = model.pos_drop(tokens)
        positions = Places.of_whole_sequence(1, patches.shape[1], tokens.device)
        return TokenSequence(tokens[:, :1], tokens[:, 1:], positions, grid)

    def shared_bias(self) -> PairBias | None:
        """The model's one table, if it has one."""
        table = self.trunk.rel_pos_bias
        return None if table is None else table()[None]

    def block_bias(self, block: Any, shared: PairBias | None) -> PairBias | None:
        """The block's own table, where it has one, beside the shared one."""
        if block.attn.relative_position_bias_table is None:
            return shared
        own = block.attn._get_rel_pos_bias()
        return own if shared is None else own + shared

    def run_block(self, block: Any, tokens: Tokens, bias: Tensor | None) -> Tokens:
        """Attention and MLP, each scaled where the block has scales."""
        attended = _attention(block.attn, block.norm1(tokens), bias)
        if block.gamma_1 is not None:
            attended = block.gamma_1 * attended
        tokens = tokens + block.drop_path1(attended)
        hidden = block.mlp(block.norm2(tokens))
        if block.gamma_2 is not None:
            hidden = block.gamma_2 * hidden
        return tokens + block.drop_path2(hidden)


def _attention(attention: Any, tokens: Tokens, bias: Tensor | None) -> Tokens:
    parts = (attention.q_bias, attention.k_bias, attention.v_bias)
    offset = None if attention.q_bias is None else torch.cat(parts)
    projected = functional.linear(tokens, attention.qkv.weight, offset)
    queries, keys, values = rearrange(
        projected, "b t (three h d) -> three b h t d", three=3, h=attention.num_heads
    )
    return attend(attention, queries, keys, values, bias)


register_backbone(TimmBeit, Preference.TOKENS)
