"""What all metrics that take parts of an image away begin with."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.errors import ArgumentError, ImageError, ImageTypeError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.explanation import check_target
from shapwrap.images import check_finite
from shapwrap.metrics.fillers import TOLERATED, check_fill, is_native
from shapwrap.metrics.predictor import Predictor
from shapwrap.metrics.ranking import Ranking, check_maps, rank_patches, rank_pixels
from shapwrap.metrics.removal import (
    FilledPixels,
    Removal,
    RemovedPatches,
    clean_logits,
    filling,
    of_target,
)


@dataclass(frozen=True)
class Measured:
    """Checked images with a class each and a ranking of their parts."""

    model: ExplainedModel
    predictor: Predictor | None
    images: Images
    target: Int[Tensor, " batch"]
    clean: Float[Tensor, " batch"]
    """Log-probability of the target on the images as they are."""
    ranking: Ranking
    settings: dict[str, str]
    """For the protocol."""

    def removal(
        self, fill: str | Tensor, generator: torch.Generator | None, *, pairs: bool = False
    ) -> Removal:
        """Answers of the model without parts of the images.

        Args:
            fill: What takes their place.
            generator: For the random filler.
            pairs: Whether native coalitions come in complement pairs.

        Raises:
            ArgumentError: A filler that cannot be had for these images.
        """
        if is_native(fill):
            told, ranks = native_predictor(self.predictor), self.ranking.ranks
            return RemovedPatches(told, self.images, ranks, pairs=pairs)
        predict = self.predictor or self.model
        prepared = filling(predict, self.images, fill, generator)
        return FilledPixels(*prepared, self.ranking.of_pixels())

    def native_in_words(self) -> str:
        """Native masking, for the protocol."""
        wrapped = None if self.predictor is None else self.predictor.wrapped
        masking = "" if wrapped is None else wrapped._wrapping.masking
        return f"native, {masking} by the model itself: p(s) = softmax(v(s) + v(empty))"


def measure(
    predict: Model,
    images: Tensor,
    maps: Tensor,
    *,
    target: int | Tensor | None,
    fill: str | Tensor,
    ranking: str | None,
    grid: Sequence[int] | None,
    chunk_size: int,
) -> Measured:
    """Check everything that was given, rank the parts and run the model on the images as they are.

    Expects `running` around it.

    Raises:
        ImageTypeError: Images that are not floating point, or in another precision than a bare
            module.
        ImageError: Images of another shape, on another device, or outside [0, 1].
        MapError: Maps of another shape, or not finite.
        TargetError: A class that the model does not have.
        ArgumentError: An option outside its range.
    """
    images = checked_images(images).detach()
    maps = check_maps(maps, images)
    check_fill(fill)
    told = predict if isinstance(predict, Predictor) else None
    size = (images.shape[-2], images.shape[-1])
    native = is_native(fill)
    unit = ranking or ("patch" if native else "pixel")
    if native:
        explained = native_predictor(told).explained
        own = explained.grid_of(native_predictor(told).normalize(images[:1]))
        if unit != "patch" or (grid is not None and tuple(grid) != own):
            raise ArgumentError(
                f"ranking is {ranking!r} and grid is {grid} with fill='native'; expected "
                f"ranking='patch' over the model's own grid, {own}: whole patches are removed."
            )
        ranked = rank_patches(maps, size, own, explained.covered(images))
    else:
        ranked = rank_cells(maps, size, unit, grid)
    model = ExplainedModel(predict)
    warn_of_normalization(predict, stacklevel=4)
    if told is None:
        model.check(images)
    logits = clean_logits(model, images, chunk_size)
    classes = check_target(target, logits)
    settings = {
        "model": repr(told) if told else getattr(predict, "__name__", type(predict).__name__),
        "images": f"{tuple(images.shape)} in [0, 1], {images.dtype}, {images.device.type}",
        "class": "predicted on the clean image" if target is None else "given",
        "score": "softmax probability, log_softmax in float32 (float64 for float64 logits)",
        "ranking": f"{ranked.unit}, N = {ranked.num_cells}, most relevant first, stable",
    }
    return Measured(model, told, images, classes, of_target(logits, classes), ranked, settings)


@contextmanager
def running(predict: Model) -> Iterator[None]:
    """Without gradients; a model, or that of a predictor, is in eval mode inside."""
    explained = predict.explained if isinstance(predict, Predictor) else ExplainedModel(predict)
    with explained.evaluated(), torch.no_grad():
        yield


def native_predictor(told: Predictor | None) -> Predictor:
    """The predictor of a wrapped model.

    Raises:
        ArgumentError: `predict` is something else.
    """
    if told is None or told.wrapped is None:
        raise ArgumentError(
            "fill='native' removes patches as a wrapped model does it; expected "
            "predict=shapwrap.metrics.predictor(ShapleyWrapper(model))."
        )
    return told


def seed_of(generator: torch.Generator | None, *fills: str | Tensor) -> str:
    """Where random pixels came from, for the protocol."""
    if not any(isinstance(fill, str) and fill == "random" for fill in fills):
        return "none, nothing is drawn"
    return str(generator.initial_seed() if generator is not None else 0)


def checked_images(images: object) -> Tensor:
    """The images, in [0, 1].

    Raises:
        ImageTypeError: Not a floating-point tensor.
        ImageError: Another shape, values outside [0, 1], or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ImageTypeError(
            f"images are {came}; expected a float tensor [B, C, H, W] in [0, 1]. Divide by 255."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ImageError(
            f"images have shape {tuple(images.shape)}; expected [B, C, H, W], none of them 0."
        )
    check_finite(images)
    low, high = images.amin().item(), images.amax().item()
    if low < -TOLERATED or high > 1 + TOLERATED:
        raise ImageError(
            f"images lie between {low:.3g} and {high:.3g}; expected [0, 1], before normalisation. "
            "Undo it with predictor(model).unnormalize(images); predict normalises by itself."
        )
    return images


def rank_cells(
    maps: Tensor, size: tuple[int, int], unit: str, grid: Sequence[int] | None
) -> Ranking:
    """Pixels or patches of checked maps, most relevant first.

    Raises:
        ArgumentError: An unknown unit, or a grid that is none or that the maps do not have.
    """
    if unit not in ("pixel", "patch"):
        raise ArgumentError(f"ranking is {unit!r}; expected 'pixel' or 'patch'.")
    return rank_pixels(maps, size) if unit == "pixel" else rank_patches(maps, size, _grid(grid))


def _grid(grid: object) -> Grid | None:
    if grid is None:
        return None
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ArgumentError(f"grid is {grid!r}; expected two positive ints, rows first.")
    rows, columns = grid
    if not all(isinstance(n, int) and n > 0 for n in (rows, columns)):
        raise ArgumentError(f"grid is {grid!r}; expected two positive ints, rows first.")
    return rows, columns


def warn_of_normalization(predict: Model, stacklevel: int) -> None:
    """Warn of a bare model whose normalisation nothing applies."""
    if not isinstance(predict, nn.Module):
        return
    told = ExplainedModel(predict).normalization
    if told is None or not (any(told.mean) or any(n != 1 for n in told.std)):
        return
    warnings.warn(
        f"predict is a {type(predict).__name__} that tells its images are normalised with mean "
        f"{told.mean} and std {told.std}, and it is given images in [0, 1]; use "
        "predict=shapwrap.metrics.predictor(model).",
        stacklevel=stacklevel,
    )
