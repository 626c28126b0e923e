"""timm's transforms of training and validation images, for a wrapped model."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.wrapper import ShapleyWrapper


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, by timm; the defaults are those of ImageNet-1k recipes.

    Mixup and cutmix mix batches, not images: `TrainerConfig(mixup=0.8, cutmix=1.0)`.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop that is resized, as a share of the image."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment and its kin, as timm writes them; None for none."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation; timm leaves it out where `auto_augment` is given."""
    erasing: float = 0.25
    """Probability that a box is replaced by noise."""


IMAGENETTE = Augmentation(scale=(0.35, 1.0))
"""Fine-tuning on few images: larger crops, as pretrained weights need no more."""


class Transforms(NamedTuple):
    """From a PIL image in RGB to a normalised tensor [3, H, W]."""

    training: Compose
    validation: Compose


def timm_transforms(
    wrapped: ShapleyWrapper,
    augmentation: Augmentation | None = None,
    *,
    normalization: Normalization | None = None,
) -> Transforms:
    """Training transform with timm's augmentations, and the model's own validation transform.

    Size and pixel statistics are those that the model was wrapped with; interpolation and the
    share of the image that validation looks at come from a timm model's pretrained configuration,
    and are bilinear and 0.875 for other models.

    Args:
        wrapped: The model that will see the images.
        augmentation: Of training images; `Augmentation()` if None.
        normalization: Mean and standard deviation of the channels, where the model does not tell.

    Raises:
        ArgumentError: The statistics are not known, or an augmentation that timm does not know.
    """
    statistics = normalization or wrapped.normalization
    if statistics is None:
        raise ArgumentError(
            f"{type(wrapped.model).__name__} does not tell mean and standard deviation of its "
            "pixels; pass normalization=(mean, std), as the model was trained."
        )
    chosen = augmentation or Augmentation()
    told = getattr(wrapped.model, "pretrained_cfg", None)
    configuration: dict[str, Any] = resolve_data_config({}, pretrained_cfg=told) if told else {}
    mean, std = statistics
    # A jitter of 0 would be a step that does nothing.
    jitter: Any = chosen.color_jitter or None
    common: dict[str, Any] = {
        "input_size": (len(mean), *wrapped.image_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": configuration.get("interpolation", "bilinear"),
    }
    try:
        training: Any = create_transform(
            **common,
            is_training=True,
            scale=chosen.scale,
            hflip=chosen.flip,
            auto_augment=chosen.auto_augment,
            color_jitter=jitter,
            re_prob=chosen.erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ArgumentError(
            f"auto_augment is {chosen.auto_augment!r}; expected what timm knows, such as "
            f"'rand-m9-mstd0.5-inc1', 'augmix-m3-w3' or None ({error})."
        ) from error
    validation: Any = create_transform(
        **common,
        crop_pct=configuration.get("crop_pct", 0.875),
        crop_mode=configuration.get("crop_mode", "center"),
    )
    return Transforms(training, validation)
