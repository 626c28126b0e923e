"""The surrogate of any model: absent patches are zero pixels, optionally with the mask shown."""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor, nn

from shapwrap._types import Coalitions, CoalitionValues, Grid, Images, Logits
from shapwrap.backbones.whole_model import mean_output
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.trained.surrogate import Surrogate, own_copy
from shapwrap.masking.pixels import pixel_mask, zero_absent_pixels


class PixelSurrogate(Surrogate):
    """A copy of a model on images whose absent patches are zero, the mean colour.

    Args:
        model: A module, which is copied, or a function from images to logits.
        grid: Rows and columns of patches.
        covered: Height and width over which the patches lie; None for the whole image.
        channels: Of the images.
        mask_channel: The model gets the mask as one more channel.

    Raises:
        UnsupportedBackboneError: `mask_channel`, and no first convolution could read it.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        grid: Grid,
        *,
        channels: int,
        covered: tuple[int, int] | None = None,
        mask_channel: bool = False,
    ):
        super().__init__()
        self.model = own_copy(model) if isinstance(model, nn.Module) else model
        self.grid = grid
        self._covered = covered
        self._mask_channel = mask_channel
        if mask_channel:
            _read_mask(self.model, channels)

    def forward(
        self, images: Images, coalitions: Coalitions, *, paired: bool = False
    ) -> CoalitionValues:
        """Logits of each coalition, [B, S, K]; a pair takes two passes here."""
        masked = zero_absent_pixels(images, coalitions, self.grid, self._covered)
        if self._mask_channel:
            size = (images.shape[-2], images.shape[-1])
            present = pixel_mask(coalitions, self.grid, size, self._covered)
            masked = torch.cat((masked, present.to(masked.dtype)), dim=1)
        return mean_output(self.model(masked)).unflatten(0, coalitions.shape[:2])

    def ends(self, images: Images, *, chunk_size: int) -> tuple[Logits, Logits]:
        """Logits of the empty and of the full coalition, [B, K] each."""
        shape = (len(images), 1, self.grid[0] * self.grid[1])
        everyone = torch.ones(shape, dtype=torch.bool, device=images.device)
        full = self.evaluate(images, everyone, paired=False, chunk_size=chunk_size)[:, 0]
        # Nothing is left of an image without patches, so that one stands for all; unless there
        # are pixels that belong to no patch.
        size = (images.shape[-2], images.shape[-1])
        asked = len(images) if self._covered not in (None, size) else 1
        empty = self.evaluate(
            images[:asked], ~everyone[:asked], paired=False, chunk_size=chunk_size
        )
        return empty[:, 0].expand_as(full), full


def _read_mask(model: object, channels: int) -> None:
    """Replaces the first convolution by one with a further input channel, of zero weight.

    Raises:
        UnsupportedBackboneError: There is none that reads the images.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedBackboneError(
            "the model is a function, to which a mask channel cannot be added; expected an "
            "nn.Module. Use mask_channel=False."
        )
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.in_channels == channels and layer.groups == 1
    ]
    if not found or not found[0][0]:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} has no convolution within it that reads {channels} channels, "
            "to which the mask could be shown; expected one. Use mask_channel=False."
        )
    name, first = found[0]
    widened = copy(first)
    widened._parameters = dict(first._parameters)
    widened.in_channels = channels + 1
    weight = first.weight.detach()
    widened.weight = nn.Parameter(torch.cat((weight, torch.zeros_like(weight[:, :1])), dim=1))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, widened)
