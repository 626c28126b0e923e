"""AOPC, log-odds and SaCo: does the prediction hang on what the map says it hangs on?"""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import Model
from shapwrap.metrics.fillers import NATIVE, describe, is_native
from shapwrap.metrics.fractions_removed import equal_groups, removed_counts
from shapwrap.metrics.measured import Measured, measure, running, seed_of
from shapwrap.metrics.protocol import Protocol, Scores
from shapwrap.metrics.ranking import ConstantMapWarning
from shapwrap.metrics.removal import (
    Interval,
    check_probabilities,
    log_probabilities,
)
from shapwrap.metrics.saco import salience_guided_coefficient

METRICS = ("aopc", "log_odds", "saco")
ON_CONSTANT = {
    "nan_skip": "NaN, left out of means",
    "zero": "0",
    "raise": "an error",
}


def faithfulness(
    predict: Model,
    images: Tensor,
    maps: Tensor,
    *,
    target: int | Tensor | None = None,
    fill: str | Tensor = "black",
    steps: int = 9,
    ranking: str | None = None,
    num_groups: int = 10,
    chunk_size: int = 64,
    on_constant: str = "nan_skip",
    absolute: bool = False,
    fractions: Sequence[float] | Tensor | str | None = None,
    grid: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    metrics: Sequence[str] = METRICS,
) -> Scores:
    """AOPC, log-odds (LOdds) and SaCo of maps, one number an image each.

    A mapping with float tensors [B] `aopc` (higher is better), `log_odds` (lower is better) and
    `saco` (in [-1, 1], higher is better); `.curves` has p - p_k and ln p_k - ln p at each step,
    `.protocol` every choice, in words. AOPC and LOdds take the most relevant cells away,
    cumulatively; SaCo replaces one of K disjoint groups at a time. p is the softmax probability of
    the target.

    Args:
        predict: Images in [0, 1] to logits, normalisation included: any function, or
            `predictor(model)`. A module runs in eval mode.
        images: Float [B, C, H, W] in [0, 1].
        maps: Float [B, h, w], one value a patch, or [B, H, W], one a pixel.
        target: Class index, or one for each image as int64 [B]; the predicted class if None.
        fill: What takes the place of pixels for AOPC and LOdds: "black", "mean" (of each channel of
            the image), "zero_normalised" (the model's mean colour), "blur", "random", or a tensor
            [], [C], [C, H, W] or [B, C, H, W] in [0, 1]. "native" removes patches as a wrapped
            model does it, for SaCo too, whose filler is otherwise the mean of each channel.
        steps: How many from 10 % to 90 % of the cells, floor(k N / 100) of them.
        ranking: "pixel" (patch maps are upsampled bilinearly) or "patch" (pixel maps are summed
            over the patches of `grid`). None is "pixel", and "patch" with the native fill.
        num_groups: K of SaCo.
        chunk_size: Perturbed images that go through the model at a time. Results do not depend on
            it.
        on_constant: SaCo of a constant map, which is 0/0: "nan_skip", "zero" or "raise".
        absolute: AOPC averages |p - p_k| instead of p - p_k.
        fractions: Instead of `steps`: shares of the cells, or "attcat" (1/9 to 1, rounded).
        grid: Rows and columns of patches, for ranking="patch" of pixel maps.
        generator: For fill="random"; a new one with seed 0 if None.
        metrics: Which to compute; AOPC and LOdds share their passes.

    Raises:
        ImageTypeError: Images that are not floating point.
        ImageError: Images of another shape, or outside [0, 1].
        MapError: Maps of another shape, or with NaN or infinity.
        TargetError: A class that the model does not have.
        ArgumentError: An option outside its range, "zero_normalised" without known statistics,
            "native" without a wrapped model, or a constant map with on_constant="raise".
        UnsupportedBackboneError: `predict` gives something else than logits [B, K].
        ShapwrapError: Logits that give no probability.

    References:
        Chen, Zheng & Ji 2020; Qiang et al. 2022 (AttCAT); Wu et al. 2024 (SaCo).
    """
    check_at_least("chunk_size", chunk_size, 1)
    wanted = set(checked_metrics(metrics))
    if on_constant not in ON_CONSTANT:
        names = ", ".join(map(repr, ON_CONSTANT))
        raise ArgumentError(f"on_constant is {on_constant!r}; expected one of {names}.")
    with running(predict):
        measured = measure(
            predict,
            images,
            maps,
            target=target,
            fill=fill,
            ranking=ranking,
            grid=grid,
            chunk_size=chunk_size,
        )
        constant = measured.ranking.constant.nonzero()[:, 0].tolist()
        if constant and on_constant == "raise":
            raise ArgumentError(
                f"maps {constant} are constant, so SaCo is 0/0 and ranks are arbitrary; expected "
                "maps that differ somewhere, or on_constant='nan_skip' or 'zero'."
            )
        cells = measured.ranking.num_cells
        counts = removed_counts(cells, steps, fractions)
        groups = equal_groups(cells, num_groups) if "saco" in wanted else []
        values: dict[str, Tensor] = {}
        curves: dict[str, Tensor] = {}
        if "aopc" in wanted or "log_odds" in wanted:
            logp = _removed(measured, [(0, n) for n in counts], fill, chunk_size, generator)
            values, curves = _aopc_and_log_odds(measured.clean, logp, absolute)
        if groups:
            values["saco"] = _saco(measured, groups, is_native(fill), chunk_size, on_constant)
    undefined = ON_CONSTANT[on_constant]
    if constant:
        said = f", and SaCo is 0/0: {undefined}" if "saco" in wanted else ""
        warnings.warn(
            f"{len(constant)} of {len(images)} maps are constant: their order is that of the "
            f"rows, row by row{said}.",
            ConstantMapWarning,
            stacklevel=2,
        )
    filler = measured.native_in_words() if is_native(fill) else describe(fill)
    of_saco = filler if is_native(fill) else describe("mean")
    settings = measured.settings.copy()
    if curves:
        named = f" ({fractions})" if isinstance(fractions, str) else ""
        settings["fill"] = filler
        settings["removed"] = f"{counts} cells{named}"
        settings["AOPC"] = f"mean over steps of {'|p - p_k|' if absolute else 'p - p_k'}"
        settings["LOdds"] = "mean over steps of ln p_k - ln p"
        settings["seed"] = seed_of(generator, fill)
    if "saco" in wanted:
        settings["SaCo"] = f"K = {num_groups} disjoint groups, 0/0 is {undefined}; fill: {of_saco}"
    return Scores(
        {name: values[name] for name in METRICS if name in wanted},
        curves={name: curves[name] for name in METRICS if name in wanted and name in curves},
        fractions=torch.tensor(counts, device=images.device) / cells,
        protocol=Protocol.of("faithfulness", settings),
    )


def _removed(
    measured: Measured,
    intervals: Sequence[Interval],
    fill: str | Tensor,
    chunk_size: int,
    generator: torch.Generator | None,
) -> Float[Tensor, "batch steps"]:
    """Log-probability of the target with each interval of ranks gone."""
    removal = measured.removal(fill, generator)
    logp = log_probabilities(removal, intervals, measured.target, chunk_size)
    check_probabilities(torch.cat((measured.clean[:, None], logp), dim=1))
    return logp


def _saco(
    measured: Measured,
    groups: Sequence[Interval],
    native: bool,
    chunk_size: int,
    on_constant: str,
) -> Float[Tensor, " batch"]:
    logp = _removed(measured, groups, NATIVE if native else "mean", chunk_size, None)
    saco = salience_guided_coefficient(measured.ranking.salience, groups, logp.exp())
    undefined = measured.ranking.constant | torch.isnan(saco)
    number = 0.0 if on_constant == "zero" else torch.nan
    return saco.masked_fill(undefined, number).to(logp.dtype)


def _aopc_and_log_odds(
    clean: Float[Tensor, " batch"], logp: Float[Tensor, "batch steps"], absolute: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    drops = clean.exp()[:, None] - logp.exp()
    limits = torch.finfo(logp.dtype)
    odds = (logp - clean[:, None]).clamp(limits.min, limits.max)
    curves = {"aopc": drops, "log_odds": odds}
    values = {
        "aopc": (drops.abs() if absolute else drops).mean(dim=1),
        # The mean of the smallest finite numbers overflows on the way.
        "log_odds": odds.mean(dim=1).clamp(limits.min, limits.max),
    }
    return values, curves


def checked_metrics(metrics: Sequence[str] | str) -> list[str]:
    """Names of the metrics to compute, each once.

    Raises:
        ArgumentError: None, or an unknown one.
    """
    wanted = [metrics] if isinstance(metrics, str) else metrics
    if not wanted or not set(wanted) <= set(METRICS):
        raise ArgumentError(f"metrics is {metrics!r}; expected some of {', '.join(METRICS)}.")
    return [name for name in METRICS if name in wanted]
