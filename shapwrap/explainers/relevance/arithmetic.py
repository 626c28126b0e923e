"""What all rules are made of: a safe division, and gradients of one operation run again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPSILON = 1e-9
"""Added to every denominator, as in the method's own scripts."""


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Of a / b: a / (b + 1e-9), and 0 where b is 0."""
    shifted = denominator + EPSILON
    shifted = torch.where(shifted == 0, torch.full_like(shifted, EPSILON), shifted)
    return torch.where(denominator == 0, torch.zeros_like(shifted), numerator / shifted)


def pulled_back(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    weigh: Callable[[int, Tensor], Tensor | None],
) -> list[Tensor]:
    """Vector-Jacobian products with respect to the inputs.

    Args:
        function: Of as many tensors as there are inputs.
        inputs: Where to take the Jacobian.
        weigh: The vector for an output, given its place and value; None for zero.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    vectors = [weigh(place, output.detach()) for place, output in enumerate(outputs)]
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if v is not None]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs],
        leaves,
        [vector.to(output.dtype) for output, vector in pairs],
        allow_unused=True,
    )
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
