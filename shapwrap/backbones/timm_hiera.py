"""timm's Hiera: patches are its mask units, each a square of tokens pooled to one."""

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Coalitions, Images
from shapwrap.backbones.positions import Positions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import EncodedTokens, Tokens, TokenSequence
from shapwrap.errors import ImageError
from shapwrap.masking.attention import AttentionMask
from shapwrap.masking.pixels import zero_absent_pixels


class TimmHiera(TimmTokens):
    """`patch_embed`, `unroll` into mask units, and blocks that attend within units or globally.

    A patch is one unit with all of its tokens, [B, N, tokens * D]. The embedding's kernels reach
    over the edge of a unit, so pixels of absent units are zero, as under the model's own mask.
    """

    family = "timm tokens, Hiera"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there, for images: its video models have a third axis."""
        parts = ("patch_embed", "unroll", "mu_size", "mask_spatial_shape", "patch_stride", "blocks")
        return (
            TimmMaps.recognises(model)
            and all(hasattr(model, part) for part in parts)
            and len(getattr(model, "mask_spatial_shape", ())) == 2
        )

    def embed(self, images: Images) -> TokenSequence:
        """Tokens of each unit, with positions; timm's random dropping of units is left out."""
        model: Any = self.trunk
        if tuple(images.shape[-2:]) != self.image_size():
            height, width = self.image_size()
            raise ImageError(
                f"{type(model).__name__} refuses images of {images.shape[-2]} x "
                f"{images.shape[-1]} pixels; its mask units are laid out for {height} x {width}."
            )
        tokens = model.unroll(model._pos_embed(model.patch_embed(images)))
        units = rearrange(tokens, "b (m n) d -> b n (m d)", m=model.mu_size)
        rows, columns = model.mask_spatial_shape
        return TokenSequence(units[:, :0], units, None, (rows, columns))

    def embed_present(
        self, images: Images, coalitions: Coalitions, *, paired: bool
    ) -> TokenSequence:
        """Tokens from images without the other units, embedded coalition by coalition."""
        rows, columns = self.trunk.mask_spatial_shape
        sequence = self.embed(zero_absent_pixels(images, coalitions, (rows, columns)))
        if not paired:
            return sequence
        others = self.embed(zero_absent_pixels(images, ~coalitions, (rows, columns)))
        present = coalitions.flatten(0, 1)[:, :, None]
        return sequence._replace(patches=torch.where(present, sequence.patches, others.patches))

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> EncodedTokens:
        """All blocks, and the mean of the tokens that pooling left of each unit."""
        model: Any = self.trunk
        num_units = tokens.shape[1]
        tokens = rearrange(tokens, "b n (m d) -> b (m n) d", m=model.mu_size)
        for block in model.blocks:
            if mask is None or block.attn.use_mask_unit_attn:
                tokens = self._run(block, tokens)
            else:
                tokens = self._run(_block, block, tokens, mask, num_units)
        return reduce(tokens, "b (m n) d -> b n d", "mean", n=num_units)

    def original_tokens(self, images: Images) -> Tokens:
        """Timm's `forward_features`, whose tokens are not in the order of rows, unit by unit."""
        num_units = math.prod(self.trunk.mask_spatial_shape)
        return reduce(self._map(images), "b (m n) d -> b n d", "mean", n=num_units)

    def image_size(self) -> tuple[int, int]:
        """The one size that the model accepts."""
        tokens, stride = self.trunk.tokens_spatial_shape, self.trunk.patch_stride
        return tokens[0] * stride[0], tokens[1] * stride[1]

    def prefix_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []


def _block(block: Any, tokens: Tokens, mask: AttentionMask, num_units: int) -> Tensor:
    """A block with global attention, its pooling of queries and, where it widens, of tokens."""
    normed = block.norm1(tokens)
    attended = block.drop_path1(block.ls1(_attention(block.attn, normed, mask, num_units)))
    if block.do_expand:
        widened = tokens if block.proj is None else block.proj(normed)
        groups = widened.unflatten(1, (block.attn.q_stride, -1))
        tokens = groups.amax(dim=1)
        if block.proj is None:
            tokens = torch.cat((tokens, groups.mean(dim=1)), dim=-1)
    tokens = tokens + attended
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _attention(attention: Any, tokens: Tokens, mask: AttentionMask, num_units: int) -> Tensor:
    queries, keys, values = rearrange(
        attention.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=attention.heads
    )
    if attention.q_stride > 1:
        queries = queries.unflatten(2, (attention.q_stride, -1)).amax(dim=2)
    # Tokens of one unit stand num_units apart.
    rows = 1 if mask.shape[-2] == 1 else queries.shape[2] // num_units
    spread = mask.repeat(1, 1, rows, keys.shape[2] // num_units)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=spread)
    return attention.proj(attended.transpose(1, 2).flatten(2))


register_backbone(TimmHiera, Preference.TOKENS)
