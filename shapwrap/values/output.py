"""What one training step needs from the wrapped model."""

from typing import NamedTuple

from shapwrap._types import CoalitionValues, Logits


class ShapleyOutput(NamedTuple):
    """Result of `wrapped(images, coalitions)`, in logits, at least float32.

    A named tuple, so that DDP, FSDP and torch.compile see the tensors in it.
    """

    logits: Logits
    """f(x), [B, K]."""
    values: CoalitionValues
    """v(s), what the model says of each masked image, [B, S, K]."""
    estimates: CoalitionValues
    """s . phi(x), what the explanation of the whole image predicts for it, [B, S, K]."""
