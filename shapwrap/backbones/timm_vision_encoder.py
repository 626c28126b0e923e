"""timm's classifiers around the vision encoder of a language model: Qwen3, DeepSeek, Gemma 4."""

from abc import abstractmethod
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.positions import Positions, RotaryPositions
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import EncodedTokens, Tokens, TokenSequence
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.masking.attention import AttentionMask, mask_of_members


class TimmVisionEncoder(TimmTokens):
    """An encoder without prefix tokens, rotary positions in all of its blocks.

    A projector that merges squares of tokens mixes them after the last block alone. With it, one
    patch is one square, whose tokens stay together: [B, N, side * side * D].
    """

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the parts are there."""
        encoder = getattr(model, "encoder", None)
        return (
            TimmMaps.recognises(model)
            and hasattr(model, "encoder_pool")
            and all(hasattr(encoder, part) for part in ("patch_embed", "blocks", *cls.own_parts))
        )

    own_parts: tuple[str, ...] = ()
    """What tells one kind of encoder from the others."""

    @abstractmethod
    def place(self, images: Images) -> tuple[Tokens, Tensor, Grid]:
        """Embedded tokens, their angles [N, 2 * head_dim], sine then cosine, and their grid."""

    @abstractmethod
    def run_block(
        self, block: Any, tokens: Tokens, angles: Tensor, mask: AttentionMask | None
    ) -> Tokens:
        """One block."""

    @abstractmethod
    def projector(self) -> tuple[Any, int]:
        """What merges squares of tokens, and their side in tokens; None and 1 if nothing does."""

    @abstractmethod
    def project_tokens(self, projector: Any, squares: Tensor) -> Tensor:
        """Squares [items, side, side, D] as one token each, [items, 1, D]."""

    def embed(self, images: Images) -> TokenSequence:
        """Patch embedding and positions, square by square."""
        self._check_divisible(images)
        tokens, angles, (rows, columns) = self.place(images)
        side = self.projector()[1]
        layout = {"r": rows // side, "c": columns // side, "i": side, "j": side}
        squares = rearrange(tokens, "b (r i c j) d -> b (r c) (i j d)", **layout)
        angles = rearrange(angles, "(r i c j) d -> (r c) (i j d)", **layout)
        positions = RotaryPositions(angles, num_prefix=0)
        return TokenSequence(squares[:, :0], squares, positions, (rows // side, columns // side))

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> EncodedTokens:
        """All blocks, the encoder's norm, and its projector where the classifier reads that."""
        if not isinstance(positions, RotaryPositions):
            raise UnsupportedBackboneError(
                f"{type(self.trunk).__name__} was given {type(positions).__name__}; expected "
                "RotaryPositions."
            )
        encoder = self.encoder
        projector, side = self.projector()
        angles = rearrange(positions.angles, "n (m d) -> (n m) d", m=side**2)
        items, patches = tokens.shape[:2]
        tokens = rearrange(tokens, "b n (m d) -> b (n m) d", m=side**2)
        mask = mask_of_members(mask, side**2)
        for block in encoder.blocks:
            tokens = self._run(self.run_block, block, tokens, angles, mask)
        if hasattr(encoder, "norm"):
            tokens = encoder.norm(tokens)
        if projector is None:
            return tokens
        squares = rearrange(tokens, "b (n i j) d -> (b n) i j d", i=side, j=side)
        return self.project_tokens(projector, squares).view(items, patches, -1)

    def original_tokens(self, images: Images) -> Tokens:
        """Timm's `forward_features`, row by row."""
        feature_map = self._map(images)
        return feature_map.flatten(1, -2)

    @property
    def encoder(self) -> Any:
        """The encoder, which holds embedding and blocks."""
        return self.trunk.encoder

    def image_size(self) -> tuple[int, int]:
        """The size of the encoder's patch embedding, else of the pretrained weights."""
        built_for = getattr(self.encoder.patch_embed, "img_size", None)
        return super().image_size() if built_for is None else (built_for[0], built_for[1])
