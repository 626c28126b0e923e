"""CLIP's attention pooling of a map, whose query is the mean of the patches (or a class token)."""

from typing import Any

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, PatchFeatures, PatchMask
from shapwrap.backbones.attention_pooling import Attention, contributions


class MapPooling:
    """timm's AttentionPool2d and RotAttentionPool2d, seen as query, keys and values."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether the layer has the parts; that it pools as claimed is proved by its output."""
        parts = ("qkv", "pos_embed", "proj", "cls_token", "head_dim", "num_heads", "pool_type")
        return all(hasattr(layer, part) for part in parts)

    def features(self, patches: PatchFeatures, present: PatchMask, grid: Grid) -> PatchFeatures:
        """Features whose mean over the present patches is what the projection reads.

        The mean query and the softmax are those of the present patches alone.
        """
        if getattr(self.layer, "cls_token", None) is None:
            weights = present.to(patches.dtype)[..., None]
            first = (patches * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        else:
            first = self.layer.cls_token[0].expand(patches.shape[0], -1)
        tokens = torch.cat((first[:, None], patches), dim=1)
        part = torch.cat((present.new_ones(present.shape[0], 1), present), dim=1)
        return contributions(self._attention(tokens, grid), part, num_extra=1)

    def _attention(self, tokens: Tensor, grid: Grid) -> Attention:
        layer = self.layer
        absolute = isinstance(layer.pos_embed, nn.Parameter)
        if absolute:
            tokens = tokens + _resampled(layer.pos_embed, layer.feat_size, grid).to(tokens.dtype)
        if layer.qkv is None:
            joined = (layer.q(tokens), layer.k(tokens), layer.v(tokens))
        else:
            joined = layer.qkv(tokens).chunk(3, dim=-1)
        query, key, value = (
            tensor.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
            for tensor in joined
        )
        if not absolute:
            # The first token, the only query that is read, has no place.
            key = torch.cat((key[:, :, :1], self._rotated(key[:, :, 1:], grid)), dim=2)
        return Attention(query[:, :, 0], key, value)

    def _rotated(self, key: Tensor, grid: Grid) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        angles = self.layer.pos_embed.get_embed(grid)
        angles = torch.cat(angles, dim=-1) if isinstance(angles, tuple) else angles
        return apply_rot_embed_cat(key, angles, half=self.layer.rotate_half).to(key.dtype)


def _resampled(positions: Tensor, built_for: Grid, grid: Grid) -> Tensor:
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(
        positions[None], list(grid), old_size=list(built_for), num_prefix_tokens=1
    )
