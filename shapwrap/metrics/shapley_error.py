"""Estimation error: how far explanations are from the model's own Shapley values."""

import warnings
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Grid
from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import Model
from shapwrap.explanation import Explanation, check_target
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.metrics.correlation import ROUNDING, pearson, spearman
from shapwrap.metrics.shapley_truth import ShapleyTruth, checked_wrapper, shapley_truth
from shapwrap.values.players import player_of_patch, sums_over_players


@dataclass(frozen=True)
class ClassErrors:
    """One number an image: of one class, or the mean over several classes."""

    l2: Float[Tensor, " batch"]
    """|phi - phi*|, in logits."""
    rmse: Float[Tensor, " batch"]
    """l2 / sqrt(N): the typical error of one patch, in logits."""
    pearson: Float[Tensor, " batch"]
    """Correlation over patches; NaN where phi or phi* is constant."""
    spearman: Float[Tensor, " batch"]
    """Correlation of ranks over patches; NaN where phi or phi* is constant."""
    skill: Float[Tensor, " batch"]
    """1 - |phi - phi*|^2 / |even spread - phi*|^2: 1 is perfect, 0 no better than the same value
    for every patch; NaN where phi* is such an even spread."""


@dataclass(frozen=True)
class ShapleyError:
    """Distance of values from the truth, per image."""

    target_class: Int[Tensor, " batch"]
    """The class compared, one an image."""
    target: ClassErrors
    """Of that class."""
    non_target: ClassErrors | None
    """Mean over the other classes, without those where a number is undefined; None where values
    were given for one class only."""
    efficiency_gap: Float[Tensor, " batch"]
    """|v(nobody) + sum of phi - v(everybody)| of the target class, in logits."""
    noise: Float[Tensor, " batch"]
    """Standard error of the truth itself, as an l2 over patches of the target class: an l2 of
    about this size cannot be told from none."""
    num_undefined: int
    """Images and classes without a correlation, since phi or phi* is constant."""
    truth: ShapleyTruth
    """What was compared with."""

    def summary(self) -> dict[str, float]:
        """Means over images, undefined ones left out."""
        means = {}
        for prefix, errors in (("target", self.target), ("non_target", self.non_target)):
            for field in fields(ClassErrors) if errors is not None else ():
                means[f"{prefix}_{field.name}"] = float(getattr(errors, field.name).nanmean())
        return means | {
            "efficiency_gap": float(self.efficiency_gap.mean()),
            "noise": float(self.noise.mean()),
            "num_undefined": float(self.num_undefined),
        }

    def __str__(self) -> str:
        """Means over images, and how the truth was made."""
        numbers = ", ".join(f"{name} {number:.4g}" for name, number in self.summary().items())
        how = ", ".join(f"{name} {what}" for name, what in self.truth.protocol().items())
        return f"{numbers}\ntruth: {how}"


def estimation_error(
    wrapped: Model,
    images: Tensor,
    *,
    target: int | Tensor | None = None,
    players: Grid | None = None,
    method: str = "auto",
    threshold: float = 0.01,
    max_coalitions: int = 131_072,
    batch_size: int = 256,
    cross_check: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int = 64,
) -> ShapleyError:
    """Error of phi = `wrapped.attribute(images)` against the model's own Shapley values, in logits.

    Args:
        wrapped: A `ShapleyWrapper`, evaluated in eval mode and left as it was.
        images: Float [B, C, H, W].
        target: Class index, or one for each image; the predicted class if None.
        players: Rows and columns of blocks of patches; phi is added up for each block.
        method: As in `shapley_truth`, with `threshold`, `max_coalitions`, `batch_size`,
            `cross_check` and `generator`.
        threshold: Of the truth's convergence.
        max_coalitions: Upper limit an image.
        batch_size: Coalitions an image between two looks at the running sums.
        cross_check: Also compare two estimators of the truth with each other.
        generator: Source of randomness; a new one with seed 0 if None.
        chunk_size: Masked images that run at a time.

    Raises:
        ShapwrapError: As `shapley_truth` and `shapley_error`.

    Warns:
        ConvergenceWarning: The truth has not converged.
        UserWarning: Correlations are undefined, or the two estimators disagree.

    References:
        Covert, Kim & Lee 2023, "Learning to Estimate Shapley Values with Vision Transformers".
    """
    wrapped = checked_wrapper(wrapped)
    truth = shapley_truth(
        wrapped,
        images,
        players=players,
        method=method,
        threshold=threshold,
        max_coalitions=max_coalitions,
        batch_size=batch_size,
        cross_check=cross_check,
        generator=generator,
        chunk_size=chunk_size,
    )
    grid = wrapped.grid_of(images)
    owner = player_of_patch(grid, truth.players)
    with evaluation_mode(wrapped.modules()), torch.no_grad():
        parts = [sums_over_players(wrapped.attribute(x), owner) for x in images.split(chunk_size)]
    return _compared(torch.cat(parts), truth, target, gathered=False, contrast=False)


def shapley_error(
    values: Tensor | Explanation, truth: ShapleyTruth, *, target: int | Tensor | None = None
) -> ShapleyError:
    """Error of any values against a truth: of one class, or of all.

    Pearson and Spearman compare methods whose values have another unit than logits (gradients,
    probabilities); l2, rmse and skill do so only for values in logits.

    Args:
        values: [B, players] of the target class, [B, players, K] of all classes, or an
            `Explanation`; where the players of the truth are blocks, an explanation's values are
            added up for each block.
        truth: Of the same images, in the same order.
        target: Class index, or one for each image; by default that of the explanation, or the
            predicted class.

    Raises:
        ArgumentError: Values of another shape, not finite, or an explanation of another target.
        TargetError: A class that the truth does not have.

    Warns:
        UserWarning: Correlations are undefined, since values are constant.
    """
    contrast = False
    if isinstance(values, Explanation):
        if target is not None:
            raise ArgumentError("target is given beside an explanation, which has its own.")
        target, contrast = values.target, values.contrast
        values = sums_over_players(values.values, player_of_patch(values.grid, truth.players))
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise ArgumentError(
            f"values are {getattr(values, 'dtype', type(values).__name__)}; expected a "
            "floating-point tensor or an Explanation."
        )
    expected = tuple(truth.values.shape)
    if tuple(values.shape) not in (expected, expected[:2]):
        raise ArgumentError(
            f"values have shape {tuple(values.shape)}; expected [B, players] = {expected[:2]} or "
            f"[B, players, K] = {expected} as in the truth."
        )
    if not torch.isfinite(values).all():
        raise ArgumentError("values contain NaN or infinity; expected finite ones.")
    return _compared(values, truth, target, gathered=values.ndim == 2, contrast=contrast)


def _compared(
    values: Tensor,
    truth: ShapleyTruth,
    target: int | Tensor | None,
    *,
    gathered: bool,
    contrast: bool,
) -> ShapleyError:
    true = truth.values.to(values.device)
    total = truth.total.to(true)
    classes = check_target(target, total + truth.estimate.empty.to(true))
    index = classes[:, None]
    noise = truth.estimate.standard_errors.to(true)
    noise = noise.gather(2, index[:, None].expand(-1, noise.shape[1], 1))[..., 0]
    if contrast:
        true, total = true - true.mean(dim=2, keepdim=True), total - total.mean(1, keepdim=True)
    if gathered:
        true = true.gather(2, index[:, None].expand(-1, true.shape[1], 1))
        total = total.gather(1, index)
        values, index = values[..., None], torch.zeros_like(index)
    values = values.to(true)
    errors = _errors(values, true, total)
    undefined = int(torch.isnan(errors["pearson"]).sum())
    if undefined:
        warnings.warn(
            f"{undefined} of {errors['pearson'].numel()} correlations (images x classes) are "
            "undefined, since the values or the truth are the same for every patch; they are NaN "
            "and left out of means.",
            stacklevel=3,
        )
    gap = (values.sum(dim=1) - total).abs()
    return ShapleyError(
        target_class=classes,
        target=_of(errors, index),
        non_target=None if gathered or true.shape[2] == 1 else _of_others(errors, index),
        efficiency_gap=gap.gather(1, index)[:, 0],
        noise=noise.square().sum(dim=1).sqrt(),
        num_undefined=undefined,
        truth=truth,
    )


def _errors(values: Tensor, true: Tensor, total: Tensor) -> dict[str, Tensor]:
    """Every field of `ClassErrors` for every class, [B, K], from [B, N, K]."""
    squares = (values - true).square().sum(dim=1)
    even = total[:, None] / true.shape[1]
    by_class, true_by_class = values.transpose(1, 2), true.transpose(1, 2)
    trivial = (even - true).square().sum(dim=1)
    scale = true.abs().amax(dim=1)
    return {
        "l2": squares.sqrt(),
        "rmse": (squares / true.shape[1]).sqrt(),
        "pearson": pearson(by_class, true_by_class, rounding=ROUNDING),
        "spearman": spearman(by_class, true_by_class, rounding=ROUNDING),
        "skill": (1 - squares / trivial).masked_fill(trivial.sqrt() <= 1e-6 * scale, torch.nan),
    }


def _of(errors: dict[str, Tensor], index: Tensor) -> ClassErrors:
    return ClassErrors(**{name: each.gather(1, index)[:, 0] for name, each in errors.items()})


def _of_others(errors: dict[str, Tensor], index: Tensor) -> ClassErrors:
    return ClassErrors(
        **{name: each.scatter(1, index, torch.nan).nanmean(dim=1) for name, each in errors.items()}
    )
