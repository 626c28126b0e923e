"""timm's Qwen3 and DeepSeek classifiers."""

from typing import Any

from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_vision_encoder import TimmVisionEncoder
from shapwrap.backbones.tokens import Tokens
from shapwrap.masking.attention import AttentionMask


class TimmQwen(TimmVisionEncoder):
    """Pre-norm blocks, one table of angles, and a merger or aligner as projector."""

    family = "timm vision encoder, pre-norm"

    own_parts = ("rope", "_pos_embed")

    def place(self, images: Images) -> tuple[Tokens, Tensor, Grid]:
        """Patch embedding with the model's own positions."""
        embedded = self.encoder.patch_embed(images)
        tokens, angles = self.encoder._pos_embed(embedded)
        return tokens, angles, (embedded.shape[1], embedded.shape[2])

    def run_block(
        self, block: Any, tokens: Tokens, angles: Tensor, mask: AttentionMask | None
    ) -> Tokens:
        """Attention and MLP; DeepSeek's block takes no mask, its attention does."""
        attended = block.attn(block.norm1(tokens), rope=angles, attn_mask=mask)
        tokens = tokens + block.drop_path1(attended)
        return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))

    def projector(self) -> tuple[Any, int]:
        """Qwen's merger, DeepSeek's aligner, or none."""
        merger = getattr(self.encoder, "merger", None)
        if merger is not None:
            return merger, merger.merge_size
        aligner = getattr(self.encoder, "aligner", None)
        return (None, 1) if aligner is None else (aligner, aligner.downsample_ratio)

    def project_tokens(self, projector: Any, squares: Tensor) -> Tensor:
        """The projector on maps of one square."""
        return projector(squares)


register_backbone(TimmQwen, Preference.TOKENS)
