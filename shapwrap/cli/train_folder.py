"""`shapwrap train`: fine-tune a model on an image folder."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapwrap.cli.run_folder import (
    SETTINGS,
    ModelSettings,
    build_model,
    save_settings,
    wrap_model,
)
from shapwrap.data.folder import load_folder
from shapwrap.errors import ArgumentError
from shapwrap.training.checkpoint import check_unused
from shapwrap.training.config import TrainerConfig
from shapwrap.training.trainer import Trainer

MEASURES = ("accuracy", "skill", "residual", "images")
"""Of the validation data, for the model card."""


@dataclass(frozen=True)
class TrainRequest:
    """What was asked for on the command line."""

    model: str
    data: Path
    out: Path
    weights: Path | None = None
    pretrained: bool = False
    resume: bool = False
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    corrupt: str = "raise"
    trainer: dict[str, Any] = field(default_factory=dict)


def train_folder(request: TrainRequest) -> dict[str, float]:
    """Trains, writes checkpoints, history and the finished model; returns the validation metrics.

    Raises:
        ArgumentError: The folders, the model or the options do not fit.
    """
    # The model's own size and statistics decide how images are read, so it is asked first.
    probe = ModelSettings(request.model, 2, request.image_size)
    asked = wrap_model(probe, build_model(probe))
    size = asked.image_size
    normalization = probe.normalization(asked)
    data = load_folder(
        request.data,
        size,
        normalization,
        batch_size=request.batch_size,
        workers=request.workers,
        limit=request.limit,
        corrupt=request.corrupt,
    )
    settings = ModelSettings(
        name=request.model,
        num_classes=len(data.class_names),
        image_size=size,
        grid=request.grid,
        class_names=data.class_names,
        mean=normalization.mean,
        std=normalization.std,
    )
    if request.resume:
        _check_same_run(request.out, settings)
    wrapped = wrap_model(
        settings, build_model(settings, request.weights, pretrained=request.pretrained)
    )
    config = TrainerConfig(output_dir=request.out, **request.trainer)
    if not request.resume:
        check_unused(request.out)
    save_settings(request.out, settings)
    trainer = Trainer(wrapped, data.train, data.validation, config=config)
    history = trainer.fit(resume=request.resume)
    metrics = [record for record in history if record["kind"] == "validation"][-1]
    # Of the weights as they were settled, where there was a budget.
    budget = history[-1] if history[-1]["kind"] == "budget" else {}
    metrics = metrics | {name: budget[name] for name in ("accuracy", "skill") if name in budget}
    measured = {name: metrics[name] for name in MEASURES if metrics.get(name) is not None}
    wrapped.save_pretrained(request.out, measured=measured, dataset=request.data.name)
    return metrics


def _check_same_run(out: Path, settings: ModelSettings) -> None:
    """A checkpoint of another model would fail late and unclearly."""
    path = out / SETTINGS
    if not path.is_file():
        raise ArgumentError(f"--resume: {out} has no {SETTINGS}; expected an earlier run there.")
    stored = json.loads(path.read_text())
    asked = json.loads(json.dumps(asdict(settings)))
    different = [name for name in asked if asked[name] != stored.get(name)]
    if different:
        came = {name: asked[name] for name in different}
        raise ArgumentError(
            f"--resume: {out} was started with other settings than {came}; expected the same "
            "model, data and sizes. Choose another --out to start anew."
        )
