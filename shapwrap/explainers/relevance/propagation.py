"""The backward walk: from one-hot relevance at the logits to the attention of every block."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from shapwrap.explainers.relevance.arithmetic import safe_divide
from shapwrap.explainers.relevance.attentions import AttentionProduct
from shapwrap.explainers.relevance.rules import relevance_of_inputs
from shapwrap.explainers.relevance.tape import Tape


@torch.no_grad()
def relevance_of_attention(
    tape: Tape, logits: Tensor, relevance: Tensor, products: Sequence[AttentionProduct]
) -> list[Tensor]:
    """The relevance that arrives at the attention probabilities of each product.

    The walk ends at the first of these products: what lies before is not needed.

    Args:
        tape: Of the forward pass that made the logits.
        logits: [B, K].
        relevance: Of the logits, [B, K]; one-hot at the class to explain.
        products: In the order of the tape.

    Raises:
        UnsupportedBackboneError: An operation on the way has no rule.
    """
    arrived: defaultdict[int, list[Tensor]] = defaultdict(list)
    arrived[id(logits)].append(relevance)
    wanted = {id(product.operation): place for place, product in enumerate(products)}
    found = [torch.zeros_like(product.probabilities) for product in products]
    for operation in reversed(tape.operations):
        outgoing = [_joined(out, arrived.pop(id(out), [])) for out in operation.outputs]
        place = wanted.get(id(operation))
        if any(part is not None for part in outgoing):
            shares = relevance_of_inputs(operation, outgoing, len(logits))
            for tensor, share in zip(operation.inputs, shares, strict=True):
                if share is not None:
                    arrived[id(tensor)].append(share)
                if place is not None and tensor is products[place].probabilities:
                    found[place] = found[place] if share is None else share
        if place == 0:
            break
    return found


def _joined(tensor: Tensor, shares: list[Tensor]) -> Tensor | None:
    """Clone rule: where a tensor goes several ways, x times the sum of R / x."""
    if len(shares) < 2:
        return shares[0] if shares else None
    return tensor * sum(safe_divide(share, tensor) for share in shares)
