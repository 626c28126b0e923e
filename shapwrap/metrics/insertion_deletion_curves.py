"""Insertion and deletion: how soon the prediction comes, and how soon it goes."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.explainers.explained_model import Model
from shapwrap.metrics.fillers import NATIVE, check_fill, describe, is_native
from shapwrap.metrics.measured import Measured, measure, running, seed_of
from shapwrap.metrics.protocol import Protocol, Scores
from shapwrap.metrics.ranking import ConstantMapWarning
from shapwrap.metrics.removal import (
    Interval,
    Removal,
    check_probabilities,
    log_probabilities,
)


def insertion_deletion(
    predict: Model,
    images: Tensor,
    maps: Tensor,
    *,
    target: int | Tensor | None = None,
    fill: str | Tensor = "black",
    insertion_fill: str | Tensor | None = None,
    steps: int = 20,
    ranking: str | None = None,
    chunk_size: int = 64,
    grid: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Scores:
    """Areas under the insertion and the deletion curve of maps, one number an image each.

    A mapping with float tensors [B] `insertion` (higher is better) and `deletion` (lower is
    better), in [0, 1]; `.curves` has the probability of the target at each point, [B, steps + 1],
    `.fractions` the share of cells inserted or deleted there, `.protocol` every choice, in words.
    Deletion goes from the image to the filler, insertion from the filler to the image, most
    relevant cells first; the area is that of the trapezoids over [0, 1].

    Args:
        predict: Images in [0, 1] to logits, normalisation included: any function, or
            `predictor(model)`. A module runs in eval mode.
        images: Float [B, C, H, W] in [0, 1].
        maps: Float [B, h, w], one value a patch, or [B, H, W], one a pixel.
        target: Class index, or one for each image as int64 [B]; the predicted class if None.
        fill: What takes the place of pixels, as in `faithfulness`; "native" removes patches as a
            wrapped model does it.
        insertion_fill: Another filler to insert into, for example "blur"; `fill` if None.
        steps: From nothing to everything; floor(k N / steps) cells at point k.
        ranking: "pixel" or "patch" as in `faithfulness`.
        chunk_size: Perturbed images that go through the model at a time.
        grid: Rows and columns of patches, for ranking="patch" of pixel maps.
        generator: For fill="random"; a new one with seed 0 if None.

    Raises:
        ImageTypeError: Images that are not floating point.
        ImageError: Images of another shape, or outside [0, 1].
        MapError: Maps of another shape, or with NaN or infinity.
        TargetError: A class that the model does not have.
        ArgumentError: An option outside its range, "zero_normalised" without known statistics, or
            "native" without a wrapped model or for one of two fillers.
        UnsupportedBackboneError: `predict` gives something else than logits [B, K].
        ShapwrapError: Logits that give no probability.

    References:
        Petsiuk, Das & Saenko 2018, "RISE".
    """
    check_at_least("chunk_size", chunk_size, 1)
    check_at_least("steps", steps, 1)
    start = fill if insertion_fill is None else insertion_fill
    check_fill(fill)
    check_fill(start, beside=fill)
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
        cells = measured.ranking.num_cells
        counts = [cells * step // steps for step in range(steps + 1)]
        if is_native(fill):
            inserted, deleted = _native(measured, counts, chunk_size)
        else:
            inserted, deleted = _filled(measured, counts, fill, start, chunk_size, generator)
        check_probabilities(torch.cat((inserted, deleted), dim=1))
    constant = int(measured.ranking.constant.sum())
    if constant:
        warnings.warn(
            f"{constant} of {len(images)} maps are constant: their order is that of the rows, "
            "row by row.",
            ConstantMapWarning,
            stacklevel=2,
        )
    fractions = torch.tensor(counts, device=images.device) / cells
    curves = {"insertion": inserted.exp(), "deletion": deleted.exp()}
    native = measured.native_in_words() if is_native(fill) else ""
    settings = measured.settings | {
        "deletion": f"from the image to: {native or describe(fill)}",
        "insertion": f"to the image from: {native or describe(start)}",
        "points": f"{counts} cells",
        "area": "trapezoids over the share of cells, 0 to 1",
        "seed": seed_of(generator, fill, start),
    }
    return Scores(
        {name: torch.trapezoid(curve, fractions.to(curve)) for name, curve in curves.items()},
        curves=curves,
        fractions=fractions,
        protocol=Protocol.of("insertion and deletion", settings),
    )


def _filled(
    measured: Measured,
    counts: list[int],
    fill: str | Tensor,
    start: str | Tensor,
    chunk_size: int,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, "batch points"], Float[Tensor, "batch points"]]:
    """Log-probability along both curves; what both have in common is run once."""
    cells = measured.ranking.num_cells
    clean = measured.clean[:, None]

    def run(removal: Removal, intervals: list[Interval]) -> Tensor:
        return log_probabilities(removal, intervals, measured.target, chunk_size)

    into = measured.removal(fill, generator)
    deletions: list[Interval] = [(0, count) for count in counts[1:]]
    insertions: list[Interval] = [(count, cells) for count in counts[:-1]]
    if start is fill or (isinstance(fill, str) and fill == start):
        # The last deletion leaves what the first insertion starts from.
        logp = run(into, deletions + insertions[1:])
        deleted, inserted = logp.split([len(deletions), len(insertions) - 1], dim=1)
        inserted = torch.cat((deleted[:, -1:], inserted), dim=1)
    else:
        deleted = run(into, deletions)
        inserted = run(measured.removal(start, generator), insertions)
    return torch.cat((inserted, clean), dim=1), torch.cat((clean, deleted), dim=1)


def _native(
    measured: Measured, counts: list[int], chunk_size: int
) -> tuple[Float[Tensor, "batch points"], Float[Tensor, "batch points"]]:
    """Log-probability along both curves; what insertion has present is what deletion has gone."""
    cells = measured.ranking.num_cells
    intervals = [each for n in counts for each in ((0, n), (n, cells))]
    # Two coalitions of a pair may cost a token model one pass, but are two of a chunk.
    pairs = chunk_size > 1
    removal = measured.removal(NATIVE, None, pairs=pairs)
    chunk_size = chunk_size - chunk_size % 2 if pairs else 1
    logp = log_probabilities(removal, intervals, measured.target, chunk_size)
    return logp[:, 1::2], logp[:, 0::2]
