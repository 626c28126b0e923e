"""timm's NaFlexVit: positions resampled to each image, registers, rotary of several kinds."""

from typing import Any

from torch import nn

from shapwrap._types import Images
from shapwrap.backbones.positions import RotaryPositions
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import TokenSequence


class TimmNaFlex(TimmTokens):
    """`embeds` patchifies, places and adds prefix tokens; blocks take rotary and a mask.

    Images [B, C, H, W] alone: the model's dictionaries of patches have no common grid.
    """

    family = "timm tokens, NaFlex"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        parts = ("embeds", "rope", "rope_is_mixed", "norm_pre", "blocks", "norm")
        return TimmMaps.recognises(model) and all(hasattr(model, part) for part in parts)

    def embed(self, images: Images) -> TokenSequence:
        """Patches, prefix tokens and positions; timm's random patch dropout is left out."""
        model: Any = self.trunk
        self._check_divisible(images)
        tokens, grid = model.embeds(images)
        positions = None
        prefix = self._num_prefix()
        if model.rope is not None:
            positions = RotaryPositions(model.rope.get_embed(shape=grid), prefix)
        tokens = model.norm_pre(tokens)
        return TokenSequence(tokens[:, :prefix], tokens[:, prefix:], positions, tuple(grid))

    def _patch_embedding(self) -> Any:
        return self.trunk.embeds

    def _rotary_per_block(self) -> bool:
        return bool(self.trunk.rope_is_mixed)

    def prefix_parameters(self) -> list[nn.Parameter]:
        """Class and register tokens, where the model has them."""
        found = (self.trunk.embeds.cls_token, self.trunk.embeds.reg_token)
        return [parameter for parameter in found if parameter is not None]


register_backbone(TimmNaFlex, Preference.TOKENS)
