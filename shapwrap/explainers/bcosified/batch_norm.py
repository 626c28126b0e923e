"""Batch normalisation that divides and subtracts nothing, so that it is a linear map."""

from typing import Any

import torch
from torch import Tensor, nn

from shapwrap.errors import TrainingError
from shapwrap.explainers.bcosified.dynamic import Dynamic
from shapwrap.explainers.bcosified.layers import copied
from shapwrap.masking.pooling import compute_dtype


class UncentredBatchNorm2d(nn.BatchNorm2d, Dynamic):
    """Y = g x / sqrt(variance + eps) for each channel: no mean is taken off, no bias added.

    The variance is the usual one, around the mean, of the batch in train mode and the running one
    in eval mode.

    Args:
        layer: A batch normalisation, frozen or not, whose gain and running variance are copied.
    """

    def __init__(self, layer: nn.Module):
        given: Any = layer
        # Frozen layers of torchvision have no momentum.
        momentum = getattr(given, "momentum", 0.1)
        super().__init__(len(given.running_var), eps=given.eps, momentum=momentum, device="meta")
        variance = copied(given.running_var)
        gain = torch.ones_like(variance) if given.weight is None else copied(given.weight)
        self.weight = nn.Parameter(gain)
        self.register_parameter("bias", None)
        self.running_mean = None
        self.running_var = variance
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=variance.device)

    def forward(self, input: Tensor) -> Tensor:
        """The input divided by the deviations of its channels, times the gains.

        Raises:
            TrainingError: One value a channel in train mode, which has no variance.
        """
        exact = input.to(compute_dtype(input))
        variance = self._variance(exact)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (exact * scale[None, :, None, None]).to(input.dtype)

    def reset_running_stats(self) -> None:
        """The variance of a new layer, 1."""
        if self.running_var is not None and self.num_batches_tracked is not None:
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def _variance(self, exact: Tensor) -> Tensor:
        running, seen = self.running_var, self.num_batches_tracked
        if not self.training and running is not None:
            return running
        if exact.numel() == exact.shape[1]:
            raise TrainingError(
                f"batch normalisation was given {tuple(exact.shape)}, one value a channel, in "
                "train mode; expected more. Use larger batches, or freeze_batch_norm=True."
            )
        measured = exact.detach() if self.detached else exact
        variance = measured.var(dim=(0, 2, 3), unbiased=False)
        if running is not None and seen is not None:
            with torch.no_grad():
                seen += 1
                share = 1 / float(seen) if self.momentum is None else self.momentum
                running.lerp_(variance.to(running.dtype), share)
        return variance
