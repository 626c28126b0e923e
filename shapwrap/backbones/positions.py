"""Positions that blocks read beside the tokens, and how they travel with the tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapwrap.errors import UnsupportedBackboneError

PairBias = Float[Tensor, "#items heads _ _"]
"""What is added to the attention of each pair of tokens."""


class Positions(ABC):
    """Where the tokens of a sequence stand, for blocks that ask for it."""

    prefix_has_slots: ClassVar[bool]
    """The blocks skip a fixed number of leading tokens, so the prefix can't leave the sequence."""

    @abstractmethod
    def take(self, patches: Int[Tensor, " kept"]) -> "Positions":
        """The same prefix with these patches alone, in this order."""

    @abstractmethod
    def with_prefix_copies(self, copies: int) -> "Positions":
        """The same patches after this many copies of the prefix; 0 only if it has no slots."""


@dataclass(frozen=True)
class RotaryPositions(Positions):
    """Rotations of queries and keys; prefix tokens are not rotated."""

    angles: Tensor
    """[..., N, 2 * head_dim], sine then cosine. The blocks leave tokens before these alone."""
    num_prefix: int

    prefix_has_slots = True

    def take(self, patches: Int[Tensor, " kept"]) -> "RotaryPositions":
        """Angles of these patches."""
        return RotaryPositions(self.angles.index_select(-2, patches), self.num_prefix)

    def with_prefix_copies(self, copies: int) -> "RotaryPositions":
        """The identity rotation for every copy but the first, which has its slots."""
        if copies == 1:
            return self
        shape = (*self.angles.shape[:-2], (copies - 1) * self.num_prefix)
        shape = (*shape, self.angles.shape[-1] // 2)
        identity = torch.cat((self.angles.new_zeros(shape), self.angles.new_ones(shape)), dim=-1)
        return RotaryPositions(torch.cat((identity, self.angles), dim=-2), self.num_prefix)


@dataclass(frozen=True)
class Places(Positions):
    """Which tokens of the model's own sequence these are, to take biases of their pairs by."""

    prefix: Int[Tensor, " prefix"]
    """Places of the prefix tokens in the model's own sequence, copy after copy."""
    patches: Int[Tensor, " patches"]
    """Places of the patches in the model's own sequence."""

    prefix_has_slots = False

    @classmethod
    def of_whole_sequence(cls, num_prefix: int, num_patches: int, device: torch.device) -> "Places":
        """Places of all tokens, prefix first."""
        places = torch.arange(num_prefix + num_patches, device=device)
        return cls(places[:num_prefix], places[num_prefix:])

    @classmethod
    def expected(cls, positions: Positions | None, model: nn.Module) -> "Places":
        """The positions, where they are of this kind.

        Raises:
            UnsupportedBackboneError: They are of another kind.
        """
        if isinstance(positions, Places):
            return positions
        raise UnsupportedBackboneError(
            f"the blocks of {type(model).__name__} were given {type(positions).__name__}; expected "
            "the Places that embedding its images gives."
        )

    @property
    def num_prefix(self) -> int:
        """Length of the prefix, all copies together."""
        return len(self.prefix)

    def take(self, patches: Int[Tensor, " kept"]) -> "Places":
        """Places of these patches."""
        return Places(self.prefix, self.patches[patches])

    def with_prefix_copies(self, copies: int) -> "Places":
        """The places of the prefix, again and again."""
        return Places(self.prefix.repeat(copies), self.patches)

    def of_sequence(self, bias: PairBias) -> PairBias:
        """Rows and columns of these tokens, from the bias of the model's own sequence."""
        places = torch.cat((self.prefix, self.patches))
        return bias.index_select(-2, places).index_select(-1, places)
