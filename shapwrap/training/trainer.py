"""The training loop, on accelerate: one process or many, CPU or GPU, without change."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.errors import BackboneTypeError, TrainingError
from shapwrap.masking.batch_norm import batch_norms, evaluation_mode
from shapwrap.training import checkpoint, engine
from shapwrap.training.config import TrainerConfig
from shapwrap.training.history import History
from shapwrap.training.loss_window import LossWindow
from shapwrap.training.objective import Objective, TaskLoss, Terms
from shapwrap.training.optimizer import make_optimizer, make_scheduler
from shapwrap.training.position import Position
from shapwrap.training.random_stream import RandomStream, global_states_kept
from shapwrap.training.validation import validate
from shapwrap.wrapper import ShapleyWrapper


class Trainer:
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
        if not isinstance(wrapped, ShapleyWrapper):
            raise BackboneTypeError(
                f"wrapped is {type(wrapped).__name__}; expected ShapleyWrapper(model)."
            )
        self.config = config or TrainerConfig()
        self.wrapped = wrapped
        self.objective = Objective(self.config, task_loss)
        self.accelerator = accelerator or engine.make_accelerator(self.config)
        self._directory = Path(self.config.output_dir) if self.config.output_dir else None
        self.history = History(self._directory if self.accelerator.is_main_process else None)
        self._train_data = self._prepare_data(train_data)
        self._val_data = None if val_data is None else self._prepare_data(val_data)
        self._batches = engine.batches_per_epoch(self._train_data, self.config)
        steps = self.config.epochs * math.ceil(self._batches / self.config.accumulation)
        self.total_steps = min(steps, self.config.max_steps or steps)
        optimizer = make_optimizer(wrapped, self.config)
        scheduler = make_scheduler(optimizer, self.config, self.total_steps)
        self.model = engine.prepare_model(self.accelerator, wrapped)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.scheduler = self.accelerator.prepare_scheduler(scheduler)
        self._started = False

    # --- what a user calls --------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Trains; returns the history, one record a validation or `log_every` steps.

        Records of kind "train" hold step, epoch, learning_rate, shapley_weight and the means of
        loss, task_loss, shapley_loss (squared logits) and masked_task_loss; those of kind
        "validation" what `evaluate` returns.

        Args:
            resume: Go on from the newest checkpoint in `output_dir`. On a CPU the result is bit
                for bit that of a run that never stopped.

        Raises:
            TrainingError: A loss is not finite, an epoch is shorter than announced, there is
                nothing to resume, or a new run would mix with an earlier one.
        """
        if self._started and not resume:
            raise TrainingError(
                "this Trainer has trained: its optimizer and schedule are used up. Make a new "
                "Trainer, or go on with fit(resume=True)."
            )
        device = self.accelerator.device
        modes = {module: module.training for module in self.model.modules()}
        with global_states_kept(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self._fit(resume)
            finally:
                for module, training in modes.items():
                    module.training = training
        return self.history.records

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, float]:
        """Accuracy, skill, residual, trivial_residual (squared logits) and number of images.

        Args:
            data: Batches of (images, labels); the validation data if None.

        Raises:
            TrainingError: There is no data.
        """
        batches = self._val_data if data is None else self._prepare_data(data)
        if batches is None:
            raise TrainingError("no validation data; pass val_data to Trainer, or data here.")
        return validate(
            self.model,
            self._on_device(batches),
            self.accelerator,
            self.config,
            split=isinstance(batches, DataLoader),
            autocast=lambda: engine.autocast(self.accelerator, self.config),
        )

    # --- one run, one epoch, one step ---------------------------------------------------------

    def _fit(self, resume: bool) -> None:
        seed = self.config.seed + 1000 * self.accelerator.process_index
        plan = {
            "total_steps": self.total_steps,
            "batches_per_epoch": self._batches,
            **self.config.what_training_depends_on(),
        }
        position = Position(
            torch.Generator().manual_seed(seed),
            RandomStream(self.config.seed),
            self._train_data,
            plan,
        )
        set_seed(seed)
        if resume:
            if self._directory is None:
                raise TrainingError("resume=True needs config.output_dir, where checkpoints lie.")
            checkpoint.load(self.accelerator, self._directory, position)
        elif self._directory is not None:
            checkpoint.check_unused(self._directory)
        self._started = True
        self.history.start(keep=position.records)
        self.model.train()
        frozen = batch_norms(self.wrapped) if self.config.freeze_batch_norm else []
        with self._progress_bar(position) as bar, evaluation_mode(frozen):
            while position.step < self.total_steps:
                self._run_epoch(position, bar)

    def _run_epoch(self, position: Position, bar: "tqdm[Any]") -> None:
        skip = position.batch
        position.start_epoch()
        window = LossWindow()
        seen = 0
        for images, targets in self._epoch_batches(position):
            seen += 1
            if seen <= skip:
                # Loaded and dropped: the data's random stream must pass through these draws.
                continue
            update = seen % self.config.accumulation == 0 or seen == self._batches
            window.add(self._step(images, targets, position, update=update))
            position.batch = seen
            if update:
                position.step += 1
                self._after_step(position, window, bar)
            if position.step >= self.total_steps:
                break
        if seen < self._batches and position.step < self.total_steps:
            raise TrainingError(
                f"epoch {position.epoch + 1} of the training data has {seen} batches, expected "
                f"{self._batches}; it must be iterable once an epoch, not a used-up generator, "
                "and not shorter than steps_per_epoch."
            )
        window.check(position.step)
        position.epoch += 1
        position.batch = 0
        position.start_epoch()
        self._after_epoch(position, bar)

    def _step(self, images: Tensor, targets: Tensor, position: Position, *, update: bool) -> Terms:
        synchronise = nullcontext() if update else self.accelerator.no_sync(self.model)
        with synchronise:
            terms = self._terms(images, targets, position)
            # backward divides by the accelerator's own setting, which may not be ours.
            divided_later = self.accelerator.gradient_accumulation_steps
            share = divided_later / self._window_length(position)
            self.accelerator.backward(terms.total * share)
        if update:
            if self.config.gradient_clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return terms

    def _window_length(self, position: Position) -> int:
        """Batches of the optimizer step that this batch belongs to; the last may have fewer."""
        start = position.batch // self.config.accumulation * self.config.accumulation
        return min(self.config.accumulation, self._batches - start)

    def _terms(self, images: Tensor, targets: Tensor, position: Position) -> Terms:
        with engine.autocast(self.accelerator, self.config):
            if not self.objective.needs_coalitions:
                return self.objective.plain(self.model(images), targets)
            coalitions = sample_coalitions(
                len(images),
                self.wrapped.patches_of(images),
                self.config.num_coalitions,
                distribution=self.config.distribution,
                generator=position.coalitions,
            ).to(images.device, non_blocking=True)
            output = self.model(images, coalitions, paired=True)
        return self.objective(output, targets, position.step / self.total_steps)

    # --- after a step, after an epoch ---------------------------------------------------------

    def _after_step(self, position: Position, window: LossWindow, bar: "tqdm[Any]") -> None:
        bar.update()
        if position.step % self.config.log_every == 0:
            means = window.check(position.step)
            bar.set_description(f"epoch {position.epoch + 1} loss {means['loss']:.3f}")
            self.history.add(
                kind="train",
                step=position.step,
                epoch=position.epoch + 1,
                learning_rate=self.scheduler.get_last_lr()[0],
                shapley_weight=self.objective.shapley_weight(
                    (position.step - 1) / self.total_steps
                ),
                **means,
            )
        every = self.config.checkpoint_every
        # The last step is saved after its validation.
        if every is not None and position.step % every == 0 and position.step < self.total_steps:
            window.check(position.step)
            self._save(position)

    def _after_epoch(self, position: Position, bar: "tqdm[Any]") -> None:
        done = position.step >= self.total_steps
        due = done or position.epoch % self.config.validate_every == 0
        if self._val_data is not None and due:
            metrics = self.evaluate()
            bar.set_postfix(accuracy=f"{metrics['accuracy']:.3f}", skill=f"{metrics['skill']:.3f}")
            self.history.add(kind="validation", step=position.step, epoch=position.epoch, **metrics)
        if self.config.checkpoint_every is None or done:
            self._save(position)

    def _save(self, position: Position) -> None:
        if self._directory is not None:
            position.records = len(self.history.records)
            keep = self.config.keep_checkpoints
            checkpoint.save(self.accelerator, self._directory, position, keep)

    # --- data ---------------------------------------------------------------------------------

    def _epoch_batches(self, position: Position) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._on_device(self._train_data)
        for _ in range(self._batches):
            with position.data.active():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
        # Past the last batch too: accelerate's loader tidies up when it ends.
        with position.data.active():
            next(batches, None)

    def _on_device(self, data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TrainingError(
                    f"a batch is {type(batch).__name__}; expected a pair (images, labels)."
                )
            images, targets = send_to_device(batch, self.accelerator.device)
            if not isinstance(targets, Tensor):
                raise TrainingError(
                    f"labels are {type(targets).__name__}; expected a tensor, one label an image."
                )
            yield images, targets

    def _prepare_data(self, data: Iterable[Any]) -> Iterable[Any]:
        return engine.prepare_data(self.accelerator, data, self.config.seed)

    def _progress_bar(self, position: Position) -> "tqdm[Any]":
        hidden = None if self.config.progress is None else not self.config.progress
        if not self.accelerator.is_main_process:
            hidden = True
        return tqdm(total=self.total_steps, initial=position.step, disable=hidden, unit="step")
