"""Settings of the trained methods; defaults as published, where the authors' code tells."""

from dataclasses import dataclass
from typing import get_args

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.trained.links import Link
from shapwrap.explainers.trained.masks import MaskDistribution
from shapwrap.training.config import LoopConfig

VIT_SURROGATE = LoopConfig(epochs=10, learning_rate=1e-5, head_multiplier=1.0, weight_decay=1e-5)
"""Fine-tunes a copy of the ViT on masked images."""
VIT_EXPLAINER = LoopConfig(
    epochs=100, learning_rate=1e-4, head_multiplier=1.0, weight_decay=1e-5, warmup=0.05
)
"""As published for ViT-Shapley, with the warm-up as a share of the steps."""
PIXEL_SURROGATE = LoopConfig(
    epochs=10, learning_rate=1e-4, head_multiplier=1.0, weight_decay=0.0, freeze_batch_norm=False
)
"""Fine-tunes a copy of the model on masked images, whose batch statistics become its own."""
UNET_EXPLAINER = LoopConfig(epochs=100, learning_rate=2e-4, head_multiplier=1.0, weight_decay=0.0)
"""The published learning rate of FastSHAP's U-Net."""


@dataclass(frozen=True)
class TrainedConfig:
    """What both trained methods have in common: two stages of training and a game.

    Raises:
        ArgumentError: A value outside its range.
    """

    surrogate: LoopConfig | None
    """Training of the surrogate; None for the model itself on masked images, untrained."""
    explainer: LoopConfig
    """Training of the explainer network."""
    link: Link | str
    """What a coalition is worth; also the unit of the values."""
    num_masks: int
    """Coalitions an image and step for the explainer."""
    surrogate_masks: int = 1
    """Coalitions an image and step for the surrogate."""
    paired: bool = True
    """The explainer's coalitions come with their complements."""
    distribution: MaskDistribution | str = "shapley"
    """Of the explainer's coalitions."""
    efficiency_weight: float = 0.0
    """Weight of the loss on the efficiency gap before normalisation."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        stages = (("surrogate", self.surrogate), ("explainer", self.explainer))
        for name, stage in stages:
            if not isinstance(stage, LoopConfig) and not (stage is None and name == "surrogate"):
                raise ArgumentError(f"{name} is {stage!r}; expected a LoopConfig.")
        directories = [str(s.output_dir) for _, s in stages if s is not None and s.output_dir]
        if len(set(directories)) < len(directories):
            raise ArgumentError(
                f"both stages have output_dir {directories[0]!r}; expected a folder for each."
            )
        for name, kind in (("link", Link), ("distribution", MaskDistribution)):
            if getattr(self, name) not in get_args(kind):
                raise ArgumentError(
                    f"{name} is {getattr(self, name)!r}; expected one of {get_args(kind)}."
                )
        for name in ("num_masks", "surrogate_masks"):
            check_at_least(name, getattr(self, name), 1)
        if self.paired and self.num_masks % 2:
            raise ArgumentError(
                f"num_masks is {self.num_masks}; paired coalitions come in twos. Pass an even "
                "number, or paired=False."
            )
        if not self.efficiency_weight >= 0:
            raise ArgumentError(
                f"efficiency_weight is {self.efficiency_weight}; expected 0 or more."
            )


@dataclass(frozen=True)
class ViTShapleyConfig(TrainedConfig):
    """Settings of `ViTShapley`."""

    surrogate: LoopConfig | None = VIT_SURROGATE
    explainer: LoopConfig = VIT_EXPLAINER
    link: Link | str = "probability"
    num_masks: int = 32
    mlp_ratio: float = 4.0
    """Hidden width of the layers after the backbone, as a multiple of the tokens' width."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.mlp_ratio > 0:
            raise ArgumentError(f"mlp_ratio is {self.mlp_ratio}; expected more than 0.")


@dataclass(frozen=True)
class FastSHAPConfig(TrainedConfig):
    """Settings of `FastSHAP`."""

    surrogate: LoopConfig | None = PIXEL_SURROGATE
    explainer: LoopConfig = UNET_EXPLAINER
    link: Link | str = "log-probability"
    num_masks: int = 2
    efficiency_weight: float = 1e-2
    mask_channel: bool = False
    """Show the surrogate the mask as a further input channel, whose weights start at zero."""
    width: int = 64
    """Channels of the U-Net at full resolution; doubled at each level, up to 8 times as many."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_at_least("width", self.width, 1)
        if self.mask_channel and self.surrogate is None:
            raise ArgumentError(
                "mask_channel=True with surrogate=None; expected a surrogate that is trained to "
                "read the mask."
            )
