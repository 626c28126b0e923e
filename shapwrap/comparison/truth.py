"""How far maps are from the model's own Shapley values, which are estimated once a model."""

from typing import Any

import torch

from shapwrap import metrics
from shapwrap.comparison.maps import rows_of
from shapwrap.comparison.measures import Subject
from shapwrap.comparison.models import model_digest
from shapwrap.comparison.store import Piece
from shapwrap.comparison.summary import Measured
from shapwrap.errors import UnsupportedBackboneError

NUMBERS = ("l2", "rmse", "pearson", "spearman", "skill")


def shapley_truth(subject: Subject) -> Measured:
    """Errors in logits, and correlations; options are those of `shapwrap.metrics.shapley_truth`.

    Raises:
        UnsupportedBackboneError: The model is not wrapped, and plays no game of its own.
    """
    truth = _truth_of_the_model(subject)
    said = rows_of(subject.explanation, slice(len(truth.values)))
    players = tuple(truth.players)
    if any(patches % blocks for patches, blocks in zip(said.grid, players, strict=True)):
        raise UnsupportedBackboneError(
            f"the method explains {said.grid[0]} x {said.grid[1]} patches, the game has "
            f"{players[0]} x {players[1]} players; expected a multiple."
        )
    error = metrics.shapley_error(said, truth)
    measured = Measured(protocol={name: str(what) for name, what in truth.protocol().items()})
    measured.protocol["class"] = "predicted"
    numbers = {name: getattr(error.target, name) for name in NUMBERS}
    measured.add_images({**numbers, "noise": error.noise})
    return measured


def _truth_of_the_model(subject: Subject) -> Any:
    """Read where an earlier method, or an earlier run, has left it."""
    wrapped = subject.model.wrapped
    if wrapped is None:
        raise UnsupportedBackboneError(
            "the Shapley values of a plain model are not defined without a way to remove patches; "
            "expected a wrapped model."
        )
    key = ("models", f"{subject.model.name}.{subject.metric.name}")
    made_from = {
        "model": model_digest(subject.model),
        "images": subject.metric.images or len(subject.data),
        "data": subject.facts["data"],
        "options": subject.metric.options,
        "seed": subject.seed,
    }
    path = subject.store.path(*key).with_name(subject.store.path(*key).name + ".pt")
    if subject.store.read(*key, made_from=made_from) is not None and path.is_file():
        return metrics.ShapleyTruth.load(path)
    images = torch.cat([subject.model.normalize(batch.images) for batch in subject.batches()])
    truth = metrics.shapley_truth(
        wrapped,
        images,
        chunk_size=subject.chunk_size,
        generator=subject.generator(),
        **subject.metric.options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    truth.save(partial)
    subject.store.forget(*key)
    partial.replace(path)
    subject.store.write(*key, piece=Piece("finished", made_from))
    return metrics.ShapleyTruth.load(path)
