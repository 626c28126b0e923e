"""The mean feature of the patches that are present."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._types import Coalitions, PatchFeatures


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of pooling, head and loss: float32, or float64 for a float64 model.

    The Shapley loss is a difference of near-equal sums; half precision would drown it.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def present_means(
    features: PatchFeatures, coalitions: Coalitions
) -> Float[Tensor, "batch coalitions features"]:
    """Mean feature over the present patches; zero for an empty coalition."""
    features = features.to(compute_dtype(features))
    weights = coalitions.to(features.dtype)
    sums = torch.einsum("bsn,bnd->bsd", weights, features)
    return sums / weights.sum(dim=-1, keepdim=True).clamp(min=1)


def without_autocast(images: Tensor) -> AbstractContextManager[object]:
    """Pooling, head and differences stay out of autocast: they are differences of large sums."""
    device = images.device.type
    # A traced graph would keep a switch that switches nothing; the meta device has none.
    on = not images.is_meta and torch.is_autocast_enabled(device)
    return torch.autocast(device_type=device, enabled=False) if on else nullcontext()
