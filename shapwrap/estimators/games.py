"""A batch of games, asked for the values of coalitions that all of them share."""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from shapwrap.errors import ArgumentError, EstimationError
from shapwrap.estimators.result import accumulation_dtype

Value = Callable[[Tensor], Tensor]
"""Coalitions, bool [B, S, N], to their values, [B, S, K] or [B, S].

With a method `select(rows: Int64 [b]) -> Value`, games that are done are not played any more.
"""


class OpenGames:
    """The games that are still played, and what was seen of them.

    Args:
        value: The games.
        batch: B.
        num_patches: N.

    Raises:
        ArgumentError: No game or no player, or values of another shape.
    """

    def __init__(self, value: Value, batch: int, num_patches: int):
        if batch < 1 or num_patches < 1:
            raise ArgumentError(
                f"batch is {batch} and num_patches is {num_patches}; both must be at least 1."
            )
        self._value = value
        self._evaluated_rows: Tensor | None = None
        self.rows = torch.arange(batch)
        self._given = batch
        self.has_classes = True
        ends = self(torch.tensor([[False], [True]]).expand(2, num_patches))
        self.empty, self.grand = ends.unbind(dim=1)

    def __call__(self, coalitions: Bool[Tensor, "coalitions patches"]) -> Tensor:
        """Values of these coalitions in every open game, [b, S, K], in the accumulation dtype.

        Raises:
            ArgumentError: The game gives something else.
            EstimationError: NaN or infinite values.
        """
        values = self._value(coalitions.expand(self._given, *coalitions.shape))
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise ArgumentError(
                f"value(coalitions) gave {getattr(values, 'dtype', type(values).__name__)}; "
                "expected a floating-point tensor [B, S, K] or [B, S]."
            )
        if values.shape[:2] != (self._given, len(coalitions)) or values.ndim not in (2, 3):
            raise ArgumentError(
                f"value(coalitions) gave shape {tuple(values.shape)}; expected [B, S, K] or [B, S] "
                f"with B = {self._given} and S = {len(coalitions)}."
            )
        if not torch.isfinite(values).all():
            raise EstimationError(
                "some coalitions have values that are not finite; expected finite ones. Run the "
                "model in float32, and look at its outputs for masked images."
            )
        self.has_classes = values.ndim == 3
        values = values if self.has_classes else values[..., None]
        self.eps = max(torch.finfo(values.dtype).eps, torch.finfo(torch.float64).eps)
        values = values.detach().to(accumulation_dtype(values.device))
        if self._evaluated_rows is not None:
            values = values[self._evaluated_rows.to(values.device)]
        return values

    def keep(self, kept: Bool[Tensor, " open"]) -> None:
        """Play only these of the open games from now on."""
        positions = kept.nonzero()[:, 0].to(self.rows.device)
        self.rows = self.rows[positions]
        if hasattr(self._value, "select"):
            self._value = self._value.select(positions)  # pyright: ignore[reportFunctionMemberAccess]
            self._given = len(positions)
        else:
            # Without a way to leave games out, all are evaluated and some are not looked at.
            self._evaluated_rows = self.rows
