"""The Shapley loss, for any training loop."""

from typing import Literal

from torch import Tensor

from shapwrap.errors import ArgumentError
from shapwrap.values.game import squared_error
from shapwrap.values.output import ShapleyOutput


def shapley_loss(
    output: ShapleyOutput,
    *,
    reduction: Literal["mean", "sum", "none"] | str = "mean",
    detach_values: bool = False,
) -> Tensor:
    """(v(s) - s . phi(x))^2, the mean over images, coalitions and classes, in squared logits.

    The mean over all classes is the exact expectation over the uniform class of Eq. 11; since
    everything is pooled before the head, it costs no more than one class.

    Args:
        output: Result of `wrapped(images, coalitions)`.
        reduction: "mean" and "sum" give a scalar, "none" gives [B, S, K].
        detach_values: Let no gradient flow into v(s), so that only the explanation is moved.
            Eq. 13 has no stop-gradient, and without it results are better.

    Raises:
        ArgumentError: `output` is not a `ShapleyOutput`, or the reduction is unknown.

    References:
        Fan, Yang & Ma 2026, Eq. 13.
    """
    if not isinstance(output, ShapleyOutput):
        raise ArgumentError(
            f"output is {type(output).__name__}; expected the ShapleyOutput of "
            "wrapped(images, coalitions). Without coalitions the wrapped model returns logits only."
        )
    values = output.values.detach() if detach_values else output.values
    errors = squared_error(values, output.estimates)
    if reduction == "none":
        return errors
    if reduction == "mean":
        return errors.mean()
    if reduction == "sum":
        return errors.sum()
    raise ArgumentError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'.")
