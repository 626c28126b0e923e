"""Everything about a contrastive training run that can be chosen."""

from dataclasses import dataclass
from typing import Literal

from shapwrap.errors import ArgumentError
from shapwrap.training.config import ShapleyConfig

ContrastiveLoss = Literal["clip", "siglip"]


@dataclass(frozen=True)
class ContrastiveConfig(ShapleyConfig):
    """Settings of a `ContrastiveTrainer`; the defaults fine-tune the image tower alone.

    Raises:
        ArgumentError: A value outside its range.
    """

    loss: ContrastiveLoss = "clip"
    """Softmax over the texts and over the images of the global batch, or SigLIP's sigmoid over all
    pairs, which needs a model with a logit bias."""
    train_text: bool = False
    """Train the text tower, too. Otherwise it stays as it is, bit for bit, and in eval mode."""
    shapley_weight: float | Literal["auto"] = 1000.0
    """Lambda at the end of its ramp, in 1 / similarity^2. A similarity times the scale s is a
    logit, so this is 1000 / s^2 in 1 / logit^2: 5 at CLIP's first scale, 14; 0.1 at its last,
    100."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._check_choices(loss=ContrastiveLoss)
        if self.shapley_weight == "auto":
            raise ArgumentError(
                "shapley_weight is 'auto'; expected a number: a contrastive run has no accuracy to "
                "hold."
            )
        if self.label_smoothing:
            raise ArgumentError(
                f"label_smoothing is {self.label_smoothing}; expected 0: contrastive losses have "
                "none."
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name):
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}; expected 0: a mixed image has no one text."
                )
