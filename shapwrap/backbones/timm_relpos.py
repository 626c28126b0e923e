"""timm's ViT with relative positions: a table, or an MLP on log-spaced distances."""

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.backbones.positions import PairBias, Places
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_pair_bias import TimmPairBias, attend
from shapwrap.backbones.tokens import Tokens, TokenSequence


class TimmRelPos(TimmPairBias):
    """`patch_embed`, an optional class token, and blocks with `rel_pos` or a shared one."""

    family = "timm tokens, relative positions"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("patch_embed", "cls_token", "shared_rel_pos", "norm", "num_prefix_tokens")
        blocks = getattr(model, "blocks", None)
        return (
            TimmMaps.recognises(model)
            and all(hasattr(model, part) for part in parts)
            and isinstance(blocks, nn.ModuleList)
            and all(hasattr(getattr(block, "attn", None), "rel_pos") for block in blocks)
        )

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding and class token; no positions enter the tokens."""
        model: Any = self.trunk
        self._check_divisible(images)
        patches = model.patch_embed(images)
        grid = self._token_grid(images, patches.shape[1])
        prefix = patches[:, :0]
        if model.cls_token is not None:
            prefix = model.cls_token.expand(images.shape[0], -1, -1)
        positions = Places.of_whole_sequence(prefix.shape[1], patches.shape[1], patches.device)
        return TokenSequence(prefix, patches, positions, grid)

    def shared_bias(self) -> PairBias | None:
        """The model's one table or MLP, if it has one."""
        shared = self.trunk.shared_rel_pos
        return None if shared is None else shared.get_bias()

    def block_bias(self, block: Any, shared: PairBias | None) -> PairBias | None:
        """The block's own table or MLP, where it has one, instead of the shared one."""
        own = block.attn.rel_pos
        return shared if own is None else own.get_bias()

    def run_block(self, block: Any, tokens: Tokens, bias: Tensor | None) -> Tokens:
        """Attention and MLP, normalised before, or after as in Swin V2."""
        if not hasattr(block, "ls1"):
            attended = _attention(block.attn, tokens, bias)
            tokens = tokens + block.drop_path1(block.norm1(attended))
            return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
        attended = _attention(block.attn, block.norm1(tokens), bias)
        tokens = tokens + block.drop_path1(block.ls1(attended))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _attention(attention: Any, tokens: Tokens, bias: Tensor | None) -> Tokens:
    queries, keys, values = rearrange(
        attention.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=attention.num_heads
    )
    return attend(attention, attention.q_norm(queries), attention.k_norm(keys), values, bias)


register_backbone(TimmRelPos, Preference.TOKENS)
