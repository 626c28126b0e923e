"""What methods that follow gradients share: precision, class scores, and captum."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Images, Logits
from shapwrap.errors import MissingDependencyError
from shapwrap.explainers.explained_model import ExplainedModel


def captum_attr() -> Any:
    """The module `captum.attr`.

    Raises:
        MissingDependencyError: captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise MissingDependencyError(
            "this method needs captum; pip install 'shapwrap[explainers]'."
        ) from error
    return captum.attr


def in_full(tensor: Tensor) -> Tensor:
    """The same numbers, in float32 unless they have more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_logits(model: ExplainedModel, dtype: torch.dtype) -> Callable[[Images], Logits]:
    """Images of full precision to logits of full precision; the model sees `dtype`.

    A path of small steps, and sums along it, would be rounded away in half precision.
    """
    return lambda images: in_full(model.logits(images.to(dtype)))


def scores(
    model: ExplainedModel,
    images: Images,
    target: Int[Tensor, " batch"],
    chunk_size: int,
    link: Callable[[Logits], Tensor] = lambda logits: logits,
) -> Float[Tensor, " batch"]:
    """One class of each image in full precision, without gradients."""
    with torch.no_grad():
        parts = [link(in_full(model.logits(part))) for part in images.split(chunk_size)]
    return torch.cat(parts).gather(1, target[:, None])[:, 0]
