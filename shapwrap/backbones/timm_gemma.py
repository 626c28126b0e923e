"""timm's Gemma 4 classifier."""

from typing import Any

import torch
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_vision_encoder import TimmVisionEncoder
from shapwrap.backbones.tokens import Tokens
from shapwrap.masking.attention import AttentionMask


class TimmGemma(TimmVisionEncoder):
    """Blocks that take cosine, sine and a mask; a pooler as projector."""

    family = "timm vision encoder, sandwich norm"

    own_parts = ("rotary_emb", "pooler")

    def place(self, images: Images) -> tuple[Tokens, Tensor, Grid]:
        """Patch embedding with learned positions, and the angles of its places."""
        encoder = self.encoder
        tokens, places, _ = encoder.patch_embed(images)
        cosine, sine = encoder.rotary_emb(tokens[:1], places[:1])
        height, width = encoder.patch_embed.patch_size
        grid = (images.shape[-2] // height, images.shape[-1] // width)
        return tokens, torch.cat((sine, cosine), dim=-1)[0], grid

    def run_block(
        self, block: Any, tokens: Tokens, angles: Tensor, mask: AttentionMask | None
    ) -> Tokens:
        """The block itself; without fused attention it would add a boolean mask as 0 and 1."""
        added = None
        if mask is not None:
            added = tokens.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        sine, cosine = angles[None].chunk(2, dim=-1)
        return block(tokens, cosine, sine, attn_mask=added)

    def projector(self) -> tuple[Any, int]:
        """The soft-token pooler, or none."""
        if self.trunk.encoder_pool != "soft":
            return None, 1
        return self.encoder.pooler, self.encoder.pooler.pooling_kernel_size

    def project_tokens(self, projector: Any, squares: Tensor) -> Tensor:
        """The pooler on grids of one square, and the encoder's standardisation."""
        side = squares.shape[1]
        places = torch.arange(side, device=squares.device)
        places = torch.cartesian_prod(places, places).flip(-1).expand(squares.shape[0], -1, -1)
        pooled, _ = projector(squares.flatten(1, 2), places, None)
        if self.encoder.std_bias is None:
            return pooled
        return (pooled - self.encoder.std_bias) * self.encoder.std_scale


register_backbone(TimmGemma, Preference.TOKENS)
