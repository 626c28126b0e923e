"""Training of the models under test: stage after stage, each going on where it was stopped."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from shapwrap.comparison.schema import check_keys, convert, from_mapping
from shapwrap.errors import ConfigurationError
from shapwrap.training.config import TrainerConfig
from shapwrap.wrapper import ShapleyWrapper

OURS = {"output_dir", "seed", "progress"}
"""Settings that the comparison decides."""

SHAPLEY = {
    "shapley_weight",
    "max_accuracy_drop",
    "shapley_ramp",
    "masked_cross_entropy",
    "num_coalitions",
    "distribution",
    "validation_coalitions",
}
"""Settings that a plain model has no use for."""


def check_training(stages: Sequence[Mapping[str, Any]], *, wrapped: bool, where: str) -> None:
    """Raise unless every stage holds settings of its trainer.

    Raises:
        ConfigurationError: An unknown setting.
        ArgumentError: A value outside its range.
    """
    for number, stage in enumerate(stages):
        _settings(stage, wrapped=wrapped, where=f"{where}[{number}]")


def train(
    module: nn.Module,
    stages: Sequence[Mapping[str, Any]],
    batches: Callable[[int], DataLoader[Any]],
    with_control: Callable[[int], tuple[DataLoader[Any], DataLoader[Any]]],
    *,
    folder: Path,
    seed: int,
    progress: bool | None,
) -> list[dict[str, Any]]:
    """Trains in place; returns the last record of each stage.

    Args:
        module: A wrapped model, for `Trainer`, or a plain one, for `fine_tune`.
        stages: Settings of each; `batch_size` among them, 32 by default.
        batches: Training batches of a size.
        with_control: The same beside others to hold an accuracy on, for `shapley_weight: auto`.
        folder: Of checkpoints; where it holds some, training goes on from them.
        seed: Of everything that is drawn.
        progress: Show a progress bar; None for only on a terminal.
    """
    # The training extra is needed here alone.
    from shapwrap.training.accuracy_budget import reference_directory
    from shapwrap.training.checkpoint import checkpoints
    from shapwrap.training.trainer import Trainer

    records = []
    for number, stage in enumerate(stages):
        wrapped = isinstance(module, ShapleyWrapper)
        config, size = _settings(stage, wrapped=wrapped, where=f"training[{number}]")
        directory = folder / f"stage-{number + 1}"
        config = dataclasses.replace(config, output_dir=directory, seed=seed, progress=progress)
        runs = [directory, reference_directory(directory)]
        resume = any(run.is_dir() and checkpoints(run) for run in runs if run is not None)
        if isinstance(module, ShapleyWrapper):
            automatic = config.shapley_weight == "auto"
            data, control = with_control(size) if automatic else (batches(size), None)
            history = Trainer(module, data, control, config=config).fit(resume=resume)
        else:
            from shapwrap.training import plain

            history = plain.fine_tune(module, batches(size), config=config, resume=resume)
        records.append(history[-1] if history else {})
    return records


def _settings(stage: Mapping[str, Any], *, wrapped: bool, where: str) -> tuple[TrainerConfig, int]:
    names = [field.name for field in dataclasses.fields(TrainerConfig) if field.name not in OURS]
    known = ["batch_size", *(name for name in names if wrapped or name not in SHAPLEY)]
    check_keys(stage, known, where)
    values = dict(stage)
    size = convert(int, values.pop("batch_size", 32), f"{where}.batch_size")
    if size < 1:
        raise ConfigurationError(f"{where}.batch_size is {size}; expected at least 1.")
    return from_mapping(TrainerConfig, values, where), size
