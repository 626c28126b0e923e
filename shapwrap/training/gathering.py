"""Tensors of all processes as one, with gradients for all of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Forward: everybody has everything. Backward: everybody gets what everybody asks of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.length = len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.length, ctx.length)


def gathered(own: Tensor) -> Tensor:
    """The rows of all processes, in the order of processes; as many each, in the default group.

    Gradients add up over processes: what DDP averages afterwards is the gradient of the mean of
    the processes' losses.
    """
    whole: Any = _Gather.apply(own.contiguous())
    return whole
