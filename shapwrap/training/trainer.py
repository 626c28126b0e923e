"""Training of a wrapped model: task and Shapley loss from one call a step."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import BackboneTypeError, TrainingError
from shapwrap.training import checkpoint, checkpoint_folder, engine
from shapwrap.training.accuracy_budget import (
    AccuracyBudget,
    PlainReference,
    reference_directory,
)
from shapwrap.training.config import TrainerConfig, config_of_kind
from shapwrap.training.faults import TrainingWarning
from shapwrap.training.fresh_coalitions import fresh_coalitions
from shapwrap.training.independent_copy import independent_copy
from shapwrap.training.loader_order import generators_kept
from shapwrap.training.loop import Loop
from shapwrap.training.mixing import Mixing
from shapwrap.training.objective import Objective, TaskLoss
from shapwrap.training.position import Position
from shapwrap.training.processes import in_main_process
from shapwrap.training.validation import validate
from shapwrap.values.output import ShapleyOutput
from shapwrap.wrapper import ShapleyWrapper


class Trainer(Loop):
    """Fine-tunes a wrapped model so that its patch values become Shapley values.

    Args:
        wrapped: The wrapped model; trained in place.
        train_data: Any iterable of (images, labels) that can be iterated once an epoch: a
            DataLoader, a list of batches. Several processes need a DataLoader, which is split.
        val_data: The same for validation.
        config: Settings.
        task_loss: From logits [B, K] and labels to a scalar; cross-entropy by default.
        accelerator: One of your own, for trackers or plugins; made from `config` by default.

    Raises:
        BackboneTypeError: `wrapped` is not a ShapleyWrapper.
        ArgumentError: A configuration of another kind.
        TrainingError: The data is not iterable, or has no length and `steps_per_epoch` is unset.
    """

    def __init__(
        self,
        wrapped: ShapleyWrapper,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        config: TrainerConfig | None = None,
        task_loss: TaskLoss | None = None,
        accelerator: Accelerator | None = None,
    ):
        if isinstance(wrapped, ShapleyCLIP):
            raise BackboneTypeError(
                "wrapped is ShapleyCLIP, which learns from images with texts; expected "
                "ShapleyWrapper(model). Use shapwrap.training.contrastive.ContrastiveTrainer, or "
                "train clip.classifier(texts) here."
            )
        if not isinstance(wrapped, ShapleyWrapper):
            raise BackboneTypeError(
                f"wrapped is {type(wrapped).__name__}; expected ShapleyWrapper(model)."
            )
        self.config = config_of_kind(config, TrainerConfig)
        self.wrapped = wrapped
        self.objective = Objective(self.config, task_loss, has_baseline=wrapped.has_baseline)
        self._mixing = Mixing.of(self.config)
        self._budget: AccuracyBudget | None = None
        if self.config.shapley_weight == "auto":
            # Before the model is prepared for its processes.
            reference = self._plain_run(train_data, val_data, task_loss, accelerator)
            drop = self.config.max_accuracy_drop
            self._budget = AccuracyBudget(reference, drop, self._mean_of_processes)
        super().__init__(wrapped, train_data, val_data, config=self.config, accelerator=accelerator)
        if self._budget is not None:
            self._check_adapts()

    @property
    def reference(self) -> PlainReference | None:
        """Plain training, with `shapley_weight="auto"`; its accuracy and weights, once trained."""
        return None if self._budget is None else self._budget.reference

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Trains; returns the history, one record a validation or `log_every` steps.

        Records of kind "train" hold step, epoch, learning_rate, shapley_weight and the means of
        loss, task_loss, shapley_loss (squared logits) and masked_task_loss; those of kind
        "validation" what `evaluate` returns. With `shapley_weight="auto"` a plain run goes before,
        and the last record, of kind "budget", is what `AccuracyBudget.settle` returns.

        Args:
            resume: Go on from the newest whole checkpoint in `output_dir`. On a CPU, with as many
                processes, the result is bit for bit that of a run that never stopped.

        Raises:
            CheckpointError: There is nothing to resume, or it was damaged; or the last checkpoint
                could not be written. Where an earlier one cannot be written, the run warns and
                goes on.
            DataWorkerError: A worker of a DataLoader died.
            TrainingError: A loss is not finite, an epoch is shorter than announced, or a new run
                would mix with an earlier one.
        """
        if self._budget is not None:
            if self._directory is not None and not resume:
                # Before the reference has been trained in vain.
                checkpoint.check_unused(self._directory)
            with generators_kept(self._train_data):
                self._budget.reference.fit(resume=resume)
            resume = resume and (self._started or self._has_begun())
        return super().fit(resume=resume)

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, float]:
        """Accuracy, skill, residual, trivial_residual (squared logits) and number of images.

        Args:
            data: Batches of (images, labels); the validation data if None.

        Raises:
            TrainingError: There is no data.
        """
        batches = self._validation_batches(data)
        return validate(
            self.model,
            self._on_device(batches),
            self.accelerator,
            self.config,
            split=isinstance(batches, DataLoader),
            autocast=lambda: engine.autocast(self.accelerator, self.config),
        )

    def _validate(self) -> dict[str, float] | None:
        return None if self._val_data is None else self.evaluate()

    def _unread_parameters(self) -> list[nn.Parameter]:
        layer = self.wrapped.patch_layer
        if layer is None or self.objective.needs_coalitions:
            return []
        return list(layer.parameters())

    def _terms(self, batch: tuple[Tensor, Tensor], position: Position) -> dict[str, Tensor]:
        images, labels = batch
        mixed = None if self._mixing is None else self._mixing(images, position.mixing())
        targets, num_classes = labels, self.wrapped.num_classes
        if mixed is not None:
            images, targets = mixed.images, mixed.targets(labels, num_classes)
        with engine.autocast(self.accelerator, self.config):
            if not self.objective.needs_coalitions:
                return self.objective.plain(self.model(images), targets).named()
            coalitions = fresh_coalitions(
                self.wrapped,
                images,
                self.config.num_coalitions,
                self.config.distribution,
                position.coalitions,
            )
            output = self.model(images, coalitions, paired=True)
        masked_targets = None
        if mixed is not None:
            grid, covered = self.wrapped.grid_of(images), self.wrapped.covered(images)
            masked_targets = mixed.masked_targets(labels, num_classes, coalitions, grid, covered)
        weight = self._shapley_weight(output, position)
        return self.objective(output, targets, weight, masked_targets).named()

    def _shapley_weight(self, output: ShapleyOutput, position: Position) -> float | Tensor:
        if self._budget is not None:
            return self._budget.weight(output)
        return self.config.ramped_weight(position.step / self.total_steps)

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self._labelled(batch)

    def _state_of_loss(self, position: Position) -> dict[str, float]:
        if self._budget is not None:
            return {"shapley_weight": self._budget.weight.last}
        return {"shapley_weight": self.config.ramped_weight((position.step - 1) / self.total_steps)}

    def _own_state(self) -> list[Any]:
        return [] if self._budget is None else [self._budget.weight]

    def _after_record(self, step: int, means: dict[str, float]) -> None:
        if self._budget is not None:
            progress = self.config.log_every / self.total_steps
            self._budget.adapt(step, means["task_loss"], progress)

    def _finish(self) -> dict[str, Any] | None:
        if self._budget is None:
            return None
        trained = self.accelerator.unwrap_model(self.model)
        return {"kind": "budget", **self._budget.settle(trained, self.evaluate)}

    def _plain_run(
        self,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None,
        task_loss: TaskLoss | None,
        accelerator: Accelerator | None,
    ) -> PlainReference:
        """Plain training of a copy.

        Raises:
            TrainingError: There is no validation data, or data that can be iterated once only.
            ArgumentError: The model cannot be copied.
        """
        if val_data is None:
            raise TrainingError(
                "shapley_weight is 'auto', which holds accuracy on validation data; pass val_data "
                "(a part of the training data, if there is no other), or a number."
            )
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if isinstance(data, Iterator):
                raise TrainingError(
                    f"{name} is {type(data).__name__}, which can be iterated once, but "
                    "shapley_weight is 'auto', which trains twice and validates more often; "
                    "expected a DataLoader, or a list of batches."
                )
        plain = replace(
            self.config,
            output_dir=reference_directory(self.config.output_dir),
            shapley_weight=0.0,
            masked_cross_entropy=0.0,
            max_accuracy_drop=0.0,
        )
        copied = independent_copy(self.wrapped)
        return PlainReference(
            Trainer(
                copied,
                train_data,
                val_data,
                config=plain,
                task_loss=task_loss,
                accelerator=accelerator,
            )
        )

    def _check_adapts(self) -> None:
        every = self.config.log_every
        if every >= self.total_steps and self.accelerator.is_main_process:
            warnings.warn(
                f"shapley_weight is 'auto', which moves at each record, but log_every={every} is "
                f"not below the {self.total_steps} steps of this run: the weight stays where it "
                "starts. Log more often.",
                TrainingWarning,
                stacklevel=3,
            )

    def _has_begun(self) -> bool:
        """Whether this run, beside its reference, has left anything to go on from."""
        directory = self._directory
        if directory is None:
            return False
        return in_main_process(self.accelerator, lambda: bool(checkpoint_folder.folders(directory)))
