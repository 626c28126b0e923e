"""A surrogate: a copy of the model that is asked, and trained, about masked images."""

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shapwrap._types import Coalitions, CoalitionValues, Grid, Images, Logits
from shapwrap.images import first_weight
from shapwrap.masking.batch_norm import evaluation_mode

Module = TypeVar("Module", bound=nn.Module)


class Surrogate(nn.Module, ABC):
    """Logits of images of which only the patches of a coalition are seen.

    What absent patches hold changes no logit.
    """

    model: Any
    grid: Grid

    @abstractmethod
    def forward(
        self, images: Images, coalitions: Coalitions, *, paired: bool = False
    ) -> CoalitionValues:
        """Logits of each coalition, [B, S, K].

        Args:
            images: Normalised pixels.
            coalitions: True where a patch is present; empty and full ones are allowed.
            paired: Coalition 2i + 1 is the complement of coalition 2i.
        """

    @abstractmethod
    def ends(self, images: Images, *, chunk_size: int) -> tuple[Logits, Logits]:
        """Logits of the empty and of the full coalition, [B, K] each."""

    @torch.no_grad()
    def evaluate(
        self, images: Images, coalitions: Coalitions, *, paired: bool, chunk_size: int
    ) -> CoalitionValues:
        """What `forward` gives in eval mode, without gradient.

        Args:
            images: Normalised pixels.
            coalitions: True where a patch is present.
            paired: As in `forward`.
            chunk_size: Masked images at a time, in pairs if `paired`.
        """
        num = coalitions.shape[1]
        images_at_a_time = max(1, chunk_size // num)
        coalitions_at_a_time = max(2, chunk_size - chunk_size % 2) if paired else chunk_size
        rows: list[Tensor] = []
        with evaluation_mode(self.modules()):
            for some, theirs in zip(
                images.split(images_at_a_time), coalitions.split(images_at_a_time), strict=True
            ):
                parts = theirs.split(coalitions_at_a_time, dim=1)
                rows.append(torch.cat([self(some, part, paired=paired) for part in parts], dim=1))
        return torch.cat(rows)


def own_copy(model: Module) -> Module:
    """A copy to train: no gradients, full precision, and not frozen as a whole."""
    copied = deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = None
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in copied.parameters()):
        copied.float()
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        copied.requires_grad_(True)
    return copied


def precision_of(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """That in which a network takes images, or the default where it has no weights."""
    weight = first_weight(module)
    return default if weight is None else weight.dtype
