"""The values of many classes in few bytes: whole numbers of steps, deflated."""

import base64
import zlib
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = (127, 90, 63, 45, 31, 22, 15)
"""Steps from 0 to the largest value of a class, finest first; the last is within 3.4 % of it."""


class QuantizedValues(NamedTuple):
    """Values of K classes as `counts` times `steps`, each within half a step."""

    counts: Int8[Tensor, "classes patches"]
    steps: Float[Tensor, " classes"]


class ClassSums(NamedTuple):
    """What the values of each class sum to, in float64: exact however they are stored."""

    positive: Float[Tensor, " classes"]
    negative: Float[Tensor, " classes"]


def quantize(values: Float[Tensor, "classes patches"], levels: int) -> QuantizedValues:
    """Rounds every value to the nearest of 2 * levels + 1 numbers, spread over its class's range.

    Args:
        values: Float32, one row a class.
        levels: At most 127.
    """
    steps = values.abs().amax(dim=1) / levels
    counts = torch.where(steps[:, None] > 0, values / steps[:, None], 0.0).round()
    return QuantizedValues(counts.clamp(-levels, levels).to(torch.int8), steps)


def sums_of(values: Float[Tensor, "classes patches"]) -> ClassSums:
    """Sums of the positive and of the negative values of each class."""
    values = values.double()
    return ClassSums(values.clamp(min=0).sum(dim=1), values.clamp(max=0).sum(dim=1))


def deflated(counts: Int8[Tensor, "classes patches"]) -> str:
    """Base64 of the zlib stream of the bytes, class by class."""
    return base64.b64encode(zlib.compress(counts.numpy().tobytes(), 9)).decode()


def as_floats(numbers: Tensor) -> str:
    """Base64 of little-endian float32."""
    flat = numbers.detach().cpu().float().contiguous().numpy()
    return base64.b64encode(flat.astype("<f4").tobytes()).decode()


def finest_that_fit(values: list[Float[Tensor, "classes patches"]], room: int) -> int:
    """The finest of `LEVELS` whose base64 takes `room` characters for all images, or the coarsest.

    Args:
        values: Those of each image.
        room: Characters for all of them together.
    """
    for levels in LEVELS[:-1]:
        taken = 0
        for rows in values:
            taken += len(deflated(quantize(rows, levels).counts))
            if taken > room:
                break
        else:
            return levels
    return LEVELS[-1]
