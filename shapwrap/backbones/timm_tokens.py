"""timm token models: ViT, DeiT, DINOv2-style and EVA, with or without registers and rotary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shapwrap._types import Grid, Images, PatchFeatures, PooledFeatures, PreLogits
from shapwrap.backbones.attention_pooling import LatentPooling, Part, contributions
from shapwrap.backbones.positions import Positions, RotaryPositions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.tokens import TokenBackbone, Tokens, TokenSequence
from shapwrap.backbones.whole_model import mean_output
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
        positions = None if rotary is None else RotaryPositions(rotary, prefix)
        return TokenSequence(tokens[:, :prefix], tokens[:, prefix:], positions, grid)

    def _check_divisible(self, images: Images) -> None:
        """Only a model that was trained so may leave rows and columns unread."""
        embedding = self._patch_embedding()
        patch = getattr(embedding, "patch_size", None)
        padded = getattr(embedding, "dynamic_img_pad", False)
        height, width = images.shape[-2:]
        if patch is None or padded or (height, width) == self.image_size():
            return
        if height % patch[0] or width % patch[1]:
            raise ImageError(
                f"{type(self.trunk).__name__} refuses images of {height} x {width} pixels: its "
                f"patches of {patch[0]} x {patch[1]} leave some unread. Crop or resize the images "
                f"to {height // patch[0] * patch[0]} x {width // patch[1] * patch[1]} after "
                "model.set_input_size of that size, or build the model with dynamic_img_pad=True."
            )

    def covered(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """Whole patches: less than the image, or more where the model pads it."""
        patch = getattr(self._patch_embedding(), "patch_size", None)
        if patch is None or not (size[0] % patch[0] or size[1] % patch[1]):
            return size
        return grid[0] * patch[0], grid[1] * patch[1]

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks and the final norm."""
        model: Any = self.trunk
        rotary = positions.angles if isinstance(positions, RotaryPositions) else None
        per_block = self._rotary_per_block()
        for index, block in enumerate(model.blocks):
            arguments: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
            if rotary is not None:
                arguments["rope"] = rotary[index] if per_block else rotary
            tokens = self._run(block, tokens, **arguments)
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

    def prefix_scores(self, prefix: Tokens) -> Tensor:
        """Timm's `forward_head`, which reads the class token, and of a distilled model two."""
        return mean_output(self.trunk.forward_head(prefix))

    def _latent_pooling(self) -> LatentPooling | None:
        layer = getattr(self.trunk, "attn_pool", None)
        if layer is None or not LatentPooling.recognises(layer):
            return None
        return LatentPooling(layer)

    @property
    def encoder(self) -> Any:
        """The module that holds embedding and blocks."""
        return self.trunk

    def in_channels(self, size: tuple[int, int] | None = None) -> int:
        """What the model was built for; its patch embedding need not be a convolution."""
        return int(getattr(self.trunk, "in_chans", 0)) or super().in_channels(size)

    def _patch_embedding(self) -> Any:
        return self.encoder.patch_embed

    def _rotary_per_block(self) -> bool:
        """Positions that are learned in each block come with a leading axis over the blocks."""
        return bool(getattr(self.trunk, "rope_mixed", False))

    def _run(self, layer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One layer, under the model's own gradient checkpointing."""
        if getattr(self.encoder, "grad_checkpointing", False) and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False, **options)
        return layer(*arguments, **options)

    def original_tokens(self, images: Images) -> Tokens:
        """Timm's `forward_features`."""
        return self._map(images)

    def prefix_parameters(self) -> list[nn.Parameter]:
        """Class, distillation and register tokens, where the model has them."""
        names = ("cls_token", "dist_token", "reg_token")
        found = (getattr(self.trunk, name, None) for name in names)
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]


register_backbone(TimmTokens, Preference.TOKENS)
