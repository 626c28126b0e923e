"""From images in [0, 1] to logits: a model together with its normalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shapwrap._types import CoalitionValues, Images, Logits
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError, ImageError, ImageTypeError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.masking.pooling import compute_dtype
from shapwrap.wrapper import ShapleyWrapper

Statistics = Normalization | tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of the channels, for pixels in [0, 1]."""


class Predictor:
    """Callable on images in [0, 1]; made by `predictor`.

    Every call runs the model in eval mode without gradients, and leaves each module in the mode it
    had.
    """

    def __init__(self, model: Model, normalization: Normalization):
        self.explained = ExplainedModel(model)
        self.normalization = normalization

    def __call__(self, images: Tensor) -> Logits:
        """Logits [B, K], in the model's own precision.

        Args:
            images: Float [B, C, H, W] in [0, 1].

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: Another shape, or other channels than the statistics have.
            UnsupportedBackboneError: The model returns something else than logits.
        """
        normalized = self.normalize(images)
        with self.explained.evaluated(), torch.no_grad():
            return self.explained.logits(normalized)

    @property
    def wrapped(self) -> ShapleyWrapper | None:
        """The wrapped model, if it is one: its native masking can be used."""
        return self.explained.wrapped

    def normalize(self, images: Tensor) -> Images:
        """(x - mean) / std, in the precision of the model's weights.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: Another shape, or other channels than the statistics have.
        """
        mean, std = self._statistics(images)
        normalized = (images.to(mean.dtype) - mean) / std
        return normalized.to(self._dtype() or images.dtype)

    def unnormalize(self, images: Tensor) -> Images:
        """X * std + mean: what `normalize` undoes, in float32 (float64 for float64 images).

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: Another shape, or other channels than the statistics have.
        """
        mean, std = self._statistics(images)
        return images.to(mean.dtype) * std + mean

    def coalition_logits(self, images: Tensor, coalitions: Tensor) -> CoalitionValues:
        """v(s) + v(empty), [B, S, K], absent patches hidden as the wrapped model hides them.

        Args:
            images: Float [B, C, H, W] in [0, 1].
            coalitions: Bool [B, S, N], True where a patch is present.

        Raises:
            ArgumentError: The model is not wrapped.
        """
        wrapped = self.wrapped
        if wrapped is None:
            raise ArgumentError(
                "this predictor is not made of a ShapleyWrapper, so patches cannot be removed "
                "natively; use predictor(ShapleyWrapper(model))."
            )
        normalized = self.normalize(images)
        with self.explained.evaluated(), torch.no_grad():
            return wrapped.value(normalized, coalitions) + wrapped.baseline

    def __repr__(self) -> str:
        model = self.wrapped.model if self.wrapped is not None else self.explained.model
        name = getattr(model, "__name__", type(model).__name__)
        kind = f"wrapped {name}" if self.wrapped is not None else name
        mean, std = (tuple(round(float(n), 4) for n in part) for part in self.normalization)
        return f"{kind}, images normalised with mean {mean} and std {std}"

    def _dtype(self) -> torch.dtype | None:
        module = self.explained.module
        parameters = [] if module is None else module.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), None)

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not images.is_floating_point():
            raise ImageTypeError(
                f"images are {images.dtype}; expected floating point in [0, 1]. Divide by 255."
            )
        channels = len(self.normalization.mean)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ImageError(
                f"images have shape {tuple(images.shape)}; expected [B, {channels}, H, W], one "
                "channel for each number of the normalisation."
            )
        mean, std = (
            torch.tensor(numbers, dtype=compute_dtype(images), device=images.device)[:, None, None]
            for numbers in self.normalization
        )
        return mean, std


def predictor(model: Model, normalization: Statistics | None = None) -> Predictor:
    """A function from images in [0, 1] to logits, as the metrics take it.

    Args:
        model: A module, a wrapped model, or any function from normalised images to logits.
        normalization: Mean and standard deviation of the channels for pixels in [0, 1]; by default
            those that the model tells: `ShapleyWrapper.normalization`, timm's `pretrained_cfg`,
            ImageNet's for torchvision's own models, `image_mean` and `image_std` of open_clip.

    Raises:
        BackboneTypeError: Neither a module nor a function.
        ArgumentError: The statistics are not known, or not one mean and one positive standard
            deviation a channel.
    """
    explained = ExplainedModel(model)
    known = normalization or explained.normalization
    if known is None:
        raise ArgumentError(
            "the model does not tell with which statistics its images are normalised; expected "
            "them in pretrained_cfg. Pass predictor(model, normalization=(mean, std)), "
            "or ((0, 0, 0), (1, 1, 1)) for a model that takes images in [0, 1]."
        )
    numbers = [tuple(float(n) for n in part) for part in known] if len(known) == 2 else []
    if (
        len(numbers) != 2
        or len(numbers[0]) != len(numbers[1])
        or not all(n > 0 for n in numbers[1])
    ):
        raise ArgumentError(
            f"normalization is {normalization!r}; expected (mean, std) with one number a channel "
            "each, standard deviations above 0."
        )
    return Predictor(model, Normalization(*numbers))
