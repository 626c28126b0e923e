"""What a coalition is worth: probability, log-probability or logit of the surrogate."""

from typing import Literal

import torch
from torch import Tensor

from shapwrap.masking.pooling import compute_dtype

Link = Literal["probability", "log-probability", "logit"]
"""From logits to the values of the game."""


def linked(logits: Tensor, link: Link | str) -> Tensor:
    """Values of the game, [..., K], in float32 or float64."""
    logits = logits.to(compute_dtype(logits))
    if link == "probability":
        return torch.softmax(logits, dim=-1)
    return torch.log_softmax(logits, dim=-1) if link == "log-probability" else logits
