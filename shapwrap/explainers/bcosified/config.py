"""Settings of the B-cosification of a CLIP tower; defaults after the authors' code."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shapwrap.errors import ArgumentError
from shapwrap.explainers.bcosified.dynamic import check_b
from shapwrap.explainers.bcosified.layers import Factor, checked
from shapwrap.training.config import LoopConfig

DistillationLoss = Literal["siglip", "cosine"]
"""How embeddings are asked to agree with those of the original tower; see `losses`."""

DISTILLATION = LoopConfig(
    epochs=90,
    learning_rate=1e-4,
    head_multiplier=1.0,
    weight_decay=0.0,
    warmup=0.0,
    freeze_batch_norm=False,
)
"""As published but for how gradients are clipped. Batch statistics follow the new layers."""


@dataclass(frozen=True)
class BcosifiedConfig:
    """Settings of `BcosifiedCLIP`.

    Raises:
        ArgumentError: A value outside its range.
    """

    distillation: LoopConfig = DISTILLATION
    """Training of the B-cosified tower."""
    b: float = 2.0
    """B at the end of the ramp."""
    b_ramp: float = 0.0
    """Share of the steps over which B grows linearly from 1; 0 for B from the start."""
    factor: Factor | str = "cosine"
    """See `bcosify`."""
    loss: DistillationLoss | str = "siglip"
    """See `DistillationLoss`."""
    logit_scale: float = 10.0
    """What the SigLIP loss multiplies cosines with."""
    logit_bias: float = -10.0
    """What it adds to them."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_b(self.b)
        checked(self.factor)
        if not isinstance(self.distillation, LoopConfig):
            raise ArgumentError(f"distillation is {self.distillation!r}; expected a LoopConfig.")
        if not 0 <= self.b_ramp <= 1:
            raise ArgumentError(f"b_ramp is {self.b_ramp}; expected 0 to 1.")
        if self.loss not in get_args(DistillationLoss):
            raise ArgumentError(
                f"loss is {self.loss!r}; expected one of {get_args(DistillationLoss)}."
            )
        if not 0 < self.logit_scale < math.inf or not math.isfinite(self.logit_bias):
            raise ArgumentError(
                f"logit_scale is {self.logit_scale} and logit_bias {self.logit_bias}; expected "
                "finite numbers, and a scale of more than 0."
            )

    def b_at(self, step: int, total_steps: int) -> float:
        """B of an optimizer step."""
        ramp = self.b_ramp * total_steps
        return 1 + (self.b - 1) * (min(1.0, step / ramp) if ramp > 0 else 1.0)
