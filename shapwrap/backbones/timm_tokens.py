"""timm token models: ViT, DeiT, DINOv2-style and EVA, with or without registers and rotary."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shapwrap._types import Images, PatchFeatures, PooledFeatures, PreLogits
from shapwrap.backbones.attention_pooling import LatentPooling, Part, contributions
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.tokens import TokenBackbone, Tokens, TokenSequence
from shapwrap.errors import ImageError
from shapwrap.masking.attention import AttentionMask


class TimmTokens(TokenBackbone, TimmMaps):
    """timm models built of patch embedding, positions, blocks and norm, in that order."""

    family = "timm tokens"

    _layout = "tokens"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there; the removal test then proves that they are all."""
        parts = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "num_prefix_tokens")
        return TimmMaps.recognises(model) and all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding and positions; timm's random patch dropout is left out."""
        model: Any = self.trunk
        self._check_divisible(images)
        embedded = model.patch_embed(images)
        if embedded.ndim == 4:
            grid = (embedded.shape[1], embedded.shape[2])
        else:
            grid = self._token_grid(images, embedded.shape[1])
        positioned = model._pos_embed(embedded)
        tokens, rotary = positioned if isinstance(positioned, tuple) else (positioned, None)
        tokens = model.norm_pre(tokens)
        prefix = self._num_prefix()
        return TokenSequence(tokens[:, :prefix], tokens[:, prefix:], rotary, grid)

    def _check_divisible(self, images: Images) -> None:
        """Rows and columns that no patch covers would be drawn as if patches had seen them."""
        patch = getattr(self.trunk.patch_embed, "patch_size", None)
        padded = getattr(self.trunk.patch_embed, "dynamic_img_pad", False)
        if patch is None or padded:
            return
        height, width = images.shape[-2:]
        if height % patch[0] or width % patch[1]:
            raise ImageError(
                f"{type(self.trunk).__name__} refuses images of {height} x {width} pixels: its "
                f"patches of {patch[0]} x {patch[1]} leave some unread. Crop or resize the images "
                f"to {height // patch[0] * patch[0]} x {width // patch[1] * patch[1]} after "
                "model.set_input_size of that size, or build the model with dynamic_img_pad=True."
            )

    def encode(self, tokens: Tokens, rotary: Tensor | None, mask: AttentionMask | None) -> Tokens:
        """All blocks, under the model's own gradient checkpointing, and the final norm."""
        model: Any = self.trunk
        recompute = getattr(model, "grad_checkpointing", False) and torch.is_grad_enabled()
        # Positions that are learned in each block come with a leading axis over the blocks.
        per_block = bool(getattr(model, "rope_mixed", False)) and rotary is not None
        for index, block in enumerate(model.blocks):
            arguments: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
            if rotary is not None:
                arguments["rope"] = rotary[index] if per_block else rotary
            if recompute:
                tokens = checkpoint(block, tokens, use_reentrant=False, **arguments)
            else:
                tokens = block(tokens, **arguments)
        return model.norm(tokens)

    def weigh(self, tokens: Tokens, part: Part, num_prefix: int) -> PatchFeatures:
        """Patch tokens, weighed by the attention pooling where the head has one."""
        pooling = self._latent_pooling()
        if pooling is None:
            return super().weigh(tokens, part, num_prefix)
        # EVA's pooling always reads the class token.
        reads_prefix = getattr(self.trunk, "pool_include_prefix", True)
        if self.prefix_tokens == "drop" or not reads_prefix:
            tokens, part, num_prefix = tokens[:, num_prefix:], part[:, num_prefix:], 0
        return contributions(pooling.attention(tokens), part, num_prefix)

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The layers between pooling and classifier."""
        pooling = self._latent_pooling()
        if pooling is None:
            return super().pre_logits(pooled)
        return self.project(self.trunk.fc_norm(pooling.after(pooled)))

    def _latent_pooling(self) -> LatentPooling | None:
        layer = getattr(self.trunk, "attn_pool", None)
        if layer is None or not LatentPooling.recognises(layer):
            return None
        return LatentPooling(layer)

    def original_tokens(self, images: Images) -> Tokens:
        """Timm's `forward_features`."""
        return self._map(images)

    def prefix_parameters(self) -> list[nn.Parameter]:
        """Class, distillation and register tokens, where the model has them."""
        names = ("cls_token", "dist_token", "reg_token")
        found = (getattr(self.trunk, name, None) for name in names)
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]
