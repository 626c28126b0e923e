"""Average precision of ranked items, many rankings at a time, ties as scikit-learn takes them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def average_precision(
    scores: Float[Tensor, "batch items"],
    positive: Bool[Tensor, "batch items"],
    counted: Bool[Tensor, "batch items"] | None = None,
) -> Float[Tensor, " batch"]:
    """AP of each row, float64: sum over distinct scores t of (R_t - R_t-1) P_t, highest first.

    Items of one score enter together, so their order does not matter. The numbers are those of
    `sklearn.metrics.average_precision_score`; a row without positives is NaN.

    Args:
        scores: Finite; larger is ranked first.
        positive: True where an item is relevant.
        counted: False for items that are left out; all count by default.
    """
    ranked, order = scores.sort(dim=1, descending=True)
    present = torch.ones_like(positive) if counted is None else counted
    hits = (positive & present).gather(1, order).cumsum(dim=1)
    seen = present.gather(1, order).cumsum(dim=1)
    last_of_score = torch.ones_like(positive)
    last_of_score[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    # Hits only grow, so the running maximum is the number at the score before.
    at_score = torch.where(last_of_score, hits, 0).cummax(dim=1).values
    before = functional.pad(at_score[:, :-1], (1, 0))
    gained = torch.where(last_of_score, hits - before, 0)
    precision = hits.double() / seen.clamp(min=1)
    return (gained * precision).sum(dim=1) / hits[:, -1]
