"""The weight of the Shapley loss in units of the task, moved by what the task can bear."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.errors import ArgumentError
from shapwrap.values.game import total_of_pairs
from shapwrap.values.output import ShapleyOutput

MEMORY = 0.95
"""Of the running mean of the squared total, a step."""
FLOOR = 0.01
"""Squared logits: a smaller total needs no explanation yet, as that of a new head."""


class AdaptiveWeight:
    """Lambda = w / M with the running mean M of v(1)^2 over images and classes.

    So lambda * Shapley loss is w times the error of the explanation as a share of what there is to
    explain, and w has the unit of the task loss, whatever the scale of the logits. w grows while
    the task loss is hardly above a reference, that of plain training at the same step, and shrinks
    while it is further above:

        d ln w / d progress = gain * clip(1 - excess / tolerance, -2, 1),

    the multiplicative update of a Lagrange multiplier for "task loss <= reference + tolerance".

    Args:
        start: The first w.
        largest: w never exceeds it.
        gain: How fast w may grow: e^gain-fold over a whole run.
        tolerance: Of the task loss, in its own unit.
        mean_of_processes: Averages a scalar over processes; None in a single process.

    Raises:
        ArgumentError: A number that is not positive, or `start` above `largest`.
    """

    def __init__(
        self,
        *,
        start: float = 2.0,
        largest: float = 100.0,
        gain: float = 10.0,
        tolerance: float = 0.05,
        mean_of_processes: Callable[[Tensor], Tensor] | None = None,
    ):
        numbers = {"start": start, "largest": largest, "gain": gain, "tolerance": tolerance}
        for name, number in numbers.items():
            if not (math.isfinite(number) and number > 0):
                raise ArgumentError(f"{name} is {number}; expected a positive number.")
        if start > largest:
            raise ArgumentError(f"start is {start}; expected at most largest={largest}.")
        self._largest, self._gain, self._tolerance = largest, gain, tolerance
        self._mean_of_processes = mean_of_processes
        self._log_weight = math.log(start)
        self._square = torch.zeros(())
        self._share = 0.0
        self._last = torch.zeros(())

    @property
    def last(self) -> float:
        """The newest lambda, in 1 / logit^2; waits for the device."""
        return float(self._last)

    @property
    def weight(self) -> float:
        """The w of now, in the unit of the task loss."""
        return math.exp(self._log_weight)

    @torch.no_grad()
    def __call__(self, output: ShapleyOutput) -> Float[Tensor, ""]:
        """Lambda for this batch, in 1 / logit^2, a scalar tensor; nothing waits for the device.

        Args:
            output: Of both branches, with complement pairs of coalitions.

        Raises:
            ArgumentError: An odd number of coalitions.
        """
        if output.estimates.shape[1] % 2:
            raise ArgumentError(
                f"output is of {output.estimates.shape[1]} coalitions an image; expected "
                "complement pairs, as sample_coalitions draws an even number of them."
            )
        # The logits less the baseline, which the output does not tell.
        square = total_of_pairs(output.estimates)[:, 0].square().mean()
        if self._mean_of_processes is not None:
            square = self._mean_of_processes(square)
        self._square = MEMORY * self._square.to(square) + (1 - MEMORY) * square
        self._share = MEMORY * self._share + (1 - MEMORY)
        self._last = self.weight / (self._square / self._share).clamp_min(FLOOR)
        return self._last

    def adapt(self, excess: float, progress: float) -> None:
        """Moves w.

        Args:
            excess: Task loss minus that of the reference at the same step.
            progress: Share of all steps since the last call.
        """
        pressure = min(1.0, max(-2.0, 1 - excess / self._tolerance))
        moved = self._log_weight + self._gain * progress * pressure
        self._log_weight = min(moved, math.log(self._largest))

    def state_dict(self) -> dict[str, float | Tensor]:
        """Everything that changes."""
        return {
            "log_weight": self._log_weight,
            "square": self._square,
            "share": self._share,
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, float | Tensor]) -> None:
        """Goes on from there."""
        self._log_weight, self._share = float(state["log_weight"]), float(state["share"])
        self._square = torch.as_tensor(state["square"])
        self._last = torch.as_tensor(state["last"])
