"""`shapley_weight="auto"`: as much skill as an accuracy budget allows."""

import gc
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap.errors import TrainingError
from shapwrap.training.adaptive_weight import AdaptiveWeight
from shapwrap.training.faults import TrainingWarning
from shapwrap.training.loop import Loop
from shapwrap.training.processes import in_main_process

TOLERANCE = 0.05
"""Of the task loss on training images, whose difference says less than accuracy: nats."""
NATS_OF_AN_ERROR = math.log(10)
"""By how much one more error in an accuracy budget raises the tolerance."""
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Of the way from the reference's weights to the trained ones, tried from the far end.

Accuracy on few images goes up and down along the way; halving the interval would take one image
too few in the middle for the end of it.
"""


class PlainReference:
    """What plain training reaches with the same model, data, schedule and random draws.

    Args:
        run: Of a copy of the model, with no Shapley loss; not started.
    """

    def __init__(self, run: Loop):
        self._run: Loop | None = run
        self._losses: dict[int, float] = {}
        self.accuracy = math.nan
        self.weights: dict[str, Tensor] = {}

    def fit(self, *, resume: bool) -> None:
        """Train, or load what a run that is resumed had trained.

        Raises:
            TrainingError: It has been trained already, and is not to go on; or what it recorded is
                not whole.
        """
        run = self._run
        if run is None:
            if resume:
                return
            raise TrainingError(
                "this Trainer has trained: its optimizer and schedule are used up. Make a new one."
            )
        run.fit(resume=resume)
        found = in_main_process(run.accelerator, lambda: _found_in(run.history.records))
        self._losses, accuracy = dict(found["losses"]), found["accuracy"]
        missing = [step for step in run.recorded_steps if step not in self._losses]
        if missing or accuracy is None:
            raise TrainingError(
                f"the history of the plain run lacks {len(missing)} of {len(run.recorded_steps)} "
                f"training records (of steps {missing[:3]} ...) or its validation; the run was "
                "begun with another log_every, or its history.jsonl was damaged. Resume with the "
                "same settings, or start anew elsewhere."
            )
        self.accuracy = float(accuracy)
        trained = run.accelerator.unwrap_model(run.model)
        self.weights = {name: one.detach().cpu() for name, one in _weights_of(trained).items()}
        # An accelerator of the user's own keeps the optimizer; nothing needs its state.
        run.optimizer.state.clear()
        self._run = None
        del run
        # Its DDP hangs in reference cycles, and would otherwise end after its process group.
        gc.collect()

    def task_loss(self, step: int) -> float:
        """Mean task loss up to this step, as its record has it."""
        return self._losses[step]


class AccuracyBudget:
    """Holds the accuracy of a run at that of plain training, minus a stated drop.

    While the run trains, the weight of the Shapley loss follows the task loss, compared with the
    reference's at the same step on the same images (`AdaptiveWeight`). At its end, if accuracy on
    validation data is below the budget, weights go back towards the reference's, on the straight
    line between both, to the first of ten points that is within it. Both came from the same start
    by the same data, and between such weights accuracy falls little (Wortsman et al. 2022, arXiv
    2109.01903).

    Args:
        reference: Plain training.
        max_drop: Of the accuracy, as a share of the images.
        mean_of_processes: Averages a scalar over processes.
    """

    def __init__(
        self,
        reference: PlainReference,
        max_drop: float,
        mean_of_processes: Callable[[Tensor], Tensor],
    ):
        self.reference = reference
        self._max_drop = max_drop
        self.weight = AdaptiveWeight(
            tolerance=TOLERANCE + NATS_OF_AN_ERROR * max_drop, mean_of_processes=mean_of_processes
        )

    def adapt(self, step: int, task_loss: float, progress: float) -> None:
        """Move the weight after this step.

        Args:
            step: One at which both runs record.
            task_loss: Its mean, as the record has it.
            progress: Share of all steps since then.
        """
        self.weight.adapt(task_loss - self.reference.task_loss(step), progress)

    def settle(
        self, module: nn.Module, evaluate: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Bring the trained weights within the budget; returns what was found.

        That is `reference_accuracy`, `accuracy`, `skill`, and `share`: how much of the way from the
        reference's weights to the trained ones is kept.

        Args:
            module: The trained model.
            evaluate: Accuracy and skill of the model as it is, on validation data.
        """
        wanted = self.reference.accuracy - self._max_drop - 1e-9
        share, found = 1.0, evaluate()
        if found["accuracy"] < wanted:
            line = _Line(module, self.reference.weights)
            for share in (*SHARES, 0.0):
                line.go_to(share)
                found = evaluate()
                if found["accuracy"] >= wanted:
                    break
            if share == 0:
                warnings.warn(
                    f"no skill was found within the accuracy budget of {self._max_drop:g}: the "
                    "model has the weights of plain training. Train longer, or allow a larger "
                    "max_accuracy_drop.",
                    TrainingWarning,
                    stacklevel=2,
                )
        return {
            "reference_accuracy": self.reference.accuracy,
            "accuracy": found["accuracy"],
            "skill": found["skill"],
            "share": share,
        }


class _Line:
    """The weights of a model, and others, between which it can be put."""

    def __init__(self, module: nn.Module, start: dict[str, Tensor]):
        self._start = start
        # What is the same at both ends stays as it is: it may be a view that cannot be written.
        self._weights = {
            name: weight
            for name, weight in _weights_of(module).items()
            if not torch.equal(start[name].to(weight.device), weight.detach())
        }
        self._end = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def go_to(self, share: float) -> None:
        """Start for 0, the model's own for 1."""
        for name, weight in self._weights.items():
            start = self._start[name].to(weight.device)
            weight.copy_(start + share * (self._end[name] - start))


def _found_in(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Task loss by step, as pairs, and the last accuracy: little to send to other processes."""
    accuracies = [r["accuracy"] for r in records if r["kind"] == "validation"]
    return {
        "losses": [(r["step"], r["task_loss"]) for r in records if r["kind"] == "train"],
        "accuracy": accuracies[-1] if accuracies else None,
    }


def reference_directory(output_dir: str | Path | None) -> Path | None:
    """Where the plain run of a run writes."""
    return None if output_dir is None else Path(output_dir) / "reference"


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and statistics by name, without counters."""
    return {
        name: weight
        for name, weight in (*module.named_parameters(), *module.named_buffers())
        if weight.is_floating_point()
    }
