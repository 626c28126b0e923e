"""timm token models whose attention adds a bias for each pair of positions."""

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.nn import functional

from shapwrap.backbones.positions import PairBias, Places, Positions
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import Tokens
from shapwrap.masking.attention import AttentionMask, masked_bias


class TimmPairBias(TimmTokens):
    """Blocks replayed with the bias of the tokens that are there, and with a mask.

    The model's own attention takes the bias of its whole sequence and no mask.
    """

    @abstractmethod
    def shared_bias(self) -> PairBias | None:
        """What all blocks add, over the model's own sequence."""

    @abstractmethod
    def block_bias(self, block: Any, shared: PairBias | None) -> PairBias | None:
        """What one block adds, over the model's own sequence."""

    @abstractmethod
    def run_block(self, block: Any, tokens: Tokens, bias: Tensor | None) -> Tokens:
        """One block, with this bias or mask in its attention."""

    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> Tokens:
        """All blocks and the final norm."""
        model: Any = self.trunk
        places = Places.expected(positions, model)
        shared = self.shared_bias()
        for block in model.blocks:
            bias = self.block_bias(block, shared)
            if bias is not None:
                bias = places.of_sequence(bias)
            tokens = self._run(self.run_block, block, tokens, masked_bias(bias, mask))
        return model.norm(tokens)


def attend(
    attention: Any, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> Tokens:
    """Scaled dot-product attention of [B, heads, T, head_dim], and the attention's own output."""
    attended = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=bias,
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )
    return attention.proj_drop(attention.proj(attended.transpose(1, 2).flatten(2)))
