"""The training loop, on accelerate: one process or many, CPU or GPU, without change."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from shapwrap.errors import CheckpointError, DataWorkerError, ShapwrapError, TrainingError
from shapwrap.masking.batch_norm import batch_norms, evaluation_mode
from shapwrap.training import checkpoint, engine
from shapwrap.training.averaged_weights import AveragedWeights
from shapwrap.training.config import LoopConfig
from shapwrap.training.fault_report import FaultReport
from shapwrap.training.faults import death_of_worker
from shapwrap.training.history import History
from shapwrap.training.loader_order import ordered
from shapwrap.training.loss_window import LossWindow
from shapwrap.training.optimizer import make_optimizer, make_scheduler
from shapwrap.training.position import Position, Split
from shapwrap.training.processes import in_main_process
from shapwrap.training.random_stream import derived_seed, global_states_kept
from shapwrap.training.resumable_data import ResumableData
from shapwrap.training.run_state import RunState
from shapwrap.training.trainable import (
    head_of,
    kept_parameters,
    names_of,
    resting_modules,
    without_gradients,
)


class Loop(ABC):
    """Epochs, steps, checkpoints and history; a subclass says what a step minimises.

    Args:
        module: What is trained, in place. It is called once a step, as several processes need it.
        train_data: Any iterable of batches that can be iterated once an epoch: a DataLoader, a
            list of batches. Several processes need a DataLoader, which is split.
        val_data: The same for validation.
        config: Settings.
        head: Parameters that learn faster, by `head_multiplier`, or alone, with `trainable="head"`;
            by default what the module's own `head_parameters()` tells.
        accelerator: One of your own, for trackers or plugins; made from `config` by default.

    Raises:
        TrainingError: The data is not iterable, or has no length and `steps_per_epoch` is unset, or
            there is nothing to train.
    """

    averaged_weights: AveragedWeights | None = None
    """The moving average of the weights, with `ema_decay`."""

    def __init__(
        self,
        module: nn.Module,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        config: LoopConfig,
        head: Iterable[nn.Parameter] | None = None,
        accelerator: Accelerator | None = None,
    ):
        self._settings = config
        self.accelerator = accelerator or engine.make_accelerator(config)
        self._directory = Path(config.output_dir) if config.output_dir else None
        self.history = History(self._directory if self.accelerator.is_main_process else None)
        self._faults = FaultReport(self.history, self.accelerator, self._directory)
        self._train_data = self._prepare_data(train_data)
        self._val_data = None if val_data is None else self._prepare_data(val_data)
        self._batches = engine.batches_per_epoch(self._train_data, config)
        steps = config.epochs * math.ceil(self._batches / config.accumulation)
        self.total_steps = min(steps, config.max_steps or steps)
        head = head_of(module, head)
        kept = kept_parameters(module, config, head) + self._unread_parameters()
        names = names_of(module, kept)
        with without_gradients(kept):
            optimizer = make_optimizer(module, config, head)
            scheduler = make_scheduler(optimizer, config, self.total_steps)
            self.model, self.optimizer = engine.prepare(self.accelerator, module, optimizer)
            if config.ema_decay is not None:
                trained = self.accelerator.unwrap_model(self.model)
                self.averaged_weights = AveragedWeights(trained, config.ema_decay)
        # FSDP2 has replaced the parameters.
        self._kept = [module.get_parameter(name) for name in names]
        for parameter in self._kept:
            parameter.requires_grad_(True)
        # Not accelerate's, which by its own settings steps once a process.
        self.scheduler = scheduler
        own = [*self._own_state(), *filter(None, [self.averaged_weights])]
        self._state = RunState(self.accelerator, module, self.optimizer, self.scheduler, own)
        self._started = False

    @property
    def recorded_steps(self) -> range:
        """Steps after which there is a training record."""
        every = self._settings.log_every
        return range(every, self.total_steps + 1, every)

    # --- what a subclass says -----------------------------------------------------------------

    @abstractmethod
    def _terms(self, batch: Any, position: Position) -> dict[str, Tensor]:
        """Named scalars of one batch; "loss" is what is minimised."""

    @abstractmethod
    def _unpack(self, batch: Any) -> Any:
        """One batch, checked, on the device.

        Raises:
            TrainingError: It is none.
        """

    def _validate(self) -> dict[str, float] | None:
        """Metrics of the validation data; None if there is none."""
        return None

    def _state_of_loss(self, position: Position) -> dict[str, float]:
        """What else goes into a training record."""
        return {}

    def _own_state(self) -> list[Any]:
        """What a checkpoint holds besides, each with a `state_dict`."""
        return []

    def _after_record(self, step: int, means: dict[str, float]) -> None:  # noqa: B027 - optional
        """What follows from the mean losses of a record, the same in all processes."""

    def _finish(self) -> dict[str, Any] | None:
        """The last record, of what was done to the trained model in the end; None for nothing."""
        return None

    def _unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that no loss reads, for whose gradients DDP would wait."""
        return []

    def _frozen(self) -> list[nn.Module]:
        """Layers that stay in eval mode."""
        if self._settings.trainable == "head":
            return resting_modules(self.model)
        return batch_norms(self.model) if self._settings.freeze_batch_norm else []

    # --- what a user calls --------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Trains; returns the history, one record a validation or `log_every` steps.

        Records of kind "train" hold step, epoch, learning_rate and the means of the losses since
        the last one, or the checkpoint or start of an epoch that came between; those of kind
        "validation" the metrics.

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
        if self._started and not resume:
            raise TrainingError(
                f"this {type(self).__name__} has trained: its optimizer and schedule are used up. "
                f"Make a new {type(self).__name__}, or go on with fit(resume=True)."
            )
        device = self.accelerator.device
        modes = {module: module.training for module in self.model.modules()}
        with (
            global_states_kept(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            without_gradients(self._kept),
        ):
            try:
                self._fit(resume)
            finally:
                for module, training in modes.items():
                    module.training = training
        return self.history.records

    # --- one run, one epoch, one step ---------------------------------------------------------

    def _fit(self, resume: bool) -> None:
        accelerator, settings = self.accelerator, self._settings
        plan = {"total_steps": self.total_steps, **settings.what_training_depends_on()}
        # Other processes may share out the same step otherwise.
        accumulation = plan.pop("accumulation")
        place = accelerator.num_processes, accelerator.process_index
        position = Position(
            settings.seed,
            self._train_data,
            Split(*place, self._batches, accumulation),
            plan,
            accelerator.device,
        )
        skipped = self._open_directory(resume, position)
        self._started = True
        keep = position.records
        # One process has the file; all have the records, or stop.
        self.history.records = in_main_process(accelerator, lambda: self.history.start(keep=keep))
        self._faults.skipped(skipped, position)
        self.model.train()
        # Of whatever was done before, an interrupted step among it.
        self.model.zero_grad()
        try:
            with self._progress_bar(position) as bar, evaluation_mode(self._frozen()):
                while position.step < self.total_steps:
                    self._run_epoch(position, bar)
            if self.averaged_weights is not None:
                self.averaged_weights.put_in_place()
            if (last := self._finish()) is not None:
                self.history.add(step=position.step, epoch=position.epoch, **last)
        except ShapwrapError as error:
            self._faults.stopped(error, position)
            raise
        except (RuntimeError, OSError, EOFError) as error:
            said = death_of_worker(error)
            if said is None:
                raise
            stopped = DataWorkerError(
                f"a process that loads data died at or just after step {position.step}: {said} It "
                "ran out of memory, crashed, or was killed; try fewer workers (num_workers). "
                f"{self._faults.what_is_saved()}"
            )
            self._faults.stopped(stopped, position)
            raise stopped from error

    def _open_directory(self, resume: bool, position: Position) -> list[dict[str, Any]]:
        """Checkpoints newer than the one that the run goes on from, which are not whole."""
        if self._directory is None:
            if resume:
                raise TrainingError("resume=True needs config.output_dir, where checkpoints lie.")
            return []
        checkpoint.check_supported(self.accelerator)
        if resume:
            return checkpoint.resume(self.accelerator, self._directory, self._state, position)
        checkpoint.check_unused(self._directory)
        return []

    def _run_epoch(self, position: Position, bar: "tqdm[Any]") -> None:
        skip = position.batch
        seen = position.open_epoch()
        window = LossWindow(self._mean_of_processes)
        with closing(self._epoch_batches(position, self._batches - seen)) as batches:
            for batch in batches:
                seen += 1
                if seen <= skip:
                    # Loaded and dropped: the data's random stream must pass through these draws.
                    continue
                update = seen % self._settings.accumulation == 0 or seen == self._batches
                window.add(self._step(batch, position, update=update))
                position.batch = seen
                if update:
                    position.step += 1
                    if self.averaged_weights is not None:
                        self.averaged_weights.update(position.step)
                    self._after_step(position, window, bar)
                if position.step >= self.total_steps:
                    break
        if seen < self._batches and position.step < self.total_steps:
            raise TrainingError(
                f"epoch {position.epoch + 1} of the training data has {seen} batches, expected "
                f"{self._batches}; it must be iterable once an epoch, not a used-up generator, "
                "and not shorter than steps_per_epoch."
            )
        window.check(position.step, self.model.parameters())
        position.epoch += 1
        position.batch = 0
        position.start_epoch()
        self._after_epoch(position, bar)

    def _step(self, batch: Any, position: Position, *, update: bool) -> dict[str, Tensor]:
        synchronise = nullcontext() if update else self.accelerator.no_sync(self.model)
        with synchronise:
            terms = self._terms(batch, position)
            # backward divides by the accelerator's own setting, which may not be ours.
            divided_later = self.accelerator.gradient_accumulation_steps
            share = divided_later / self._window_length(position)
            self.accelerator.backward(terms["loss"] * share)
        if update:
            clip = self._settings.gradient_clip
            if clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return terms

    def _window_length(self, position: Position) -> int:
        """Batches of the optimizer step that this batch belongs to; the last may have fewer."""
        accumulation = self._settings.accumulation
        start = position.batch // accumulation * accumulation
        return min(accumulation, self._batches - start)

    # --- after a step, after an epoch ---------------------------------------------------------

    def _after_step(self, position: Position, window: LossWindow, bar: "tqdm[Any]") -> None:
        bar.update()
        if position.step % self._settings.log_every == 0:
            means = window.check(position.step)
            bar.set_description(f"epoch {position.epoch + 1} loss {means['loss']:.3f}")
            self.history.add(
                kind="train",
                step=position.step,
                epoch=position.epoch + 1,
                learning_rate=self.scheduler.get_last_lr()[0],
                **self._state_of_loss(position),
                **means,
            )
            self._after_record(position.step, means)
        every = self._settings.checkpoint_every
        # The last step is saved after its validation.
        if every is not None and position.step % every == 0 and position.step < self.total_steps:
            window.check(position.step, self.model.parameters())
            self._save(position)

    def _after_epoch(self, position: Position, bar: "tqdm[Any]") -> None:
        done = position.step >= self.total_steps
        if done or position.epoch % self._settings.validate_every == 0:
            averaged = self.averaged_weights
            with nullcontext() if averaged is None else averaged.in_place():
                metrics = self._validate()
            if metrics is not None:
                shown = {k: f"{metrics[k]:.3f}" for k in ("accuracy", "skill") if k in metrics}
                bar.set_postfix(shown)
                self.history.add(
                    kind="validation", step=position.step, epoch=position.epoch, **metrics
                )
        if self._settings.checkpoint_every is None or done:
            self._save(position)

    def _save(self, position: Position) -> None:
        if self._directory is not None:
            position.records = len(self.history.records)
            keep = self._settings.keep_checkpoints
            try:
                checkpoint.save(self.accelerator, self._directory, self._state, position, keep)
            except CheckpointError as error:
                finished = position.step >= self.total_steps
                self._faults.not_saved(error, position, finished=finished)

    # --- data ---------------------------------------------------------------------------------

    def _epoch_batches(self, position: Position, num: int) -> Generator[Any]:
        with closing(self._on_device(self._train_data, position.epoch)) as batches:
            for _ in range(num):
                with position.data.active():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
            # Past the last batch too: accelerate's loader tidies up when it ends.
            with position.data.active():
                next(batches, None)

    def _on_device(self, data: Iterable[Any], epoch: int = 0) -> Generator[Any]:
        """Batches as training takes them, in an order that depends on seed and epoch alone."""
        set_epoch: Any = getattr(data, "set_epoch", None)
        if isinstance(data, DataLoader) and set_epoch is not None:
            # accelerate counts the iterations of a process, not of the run.
            set_epoch(epoch)
        with ordered(data, derived_seed("order", self._settings.seed, epoch)):
            for batch in data:
                yield self._unpack(batch)

    def _validation_batches(self, data: Iterable[Any] | None = None) -> Iterable[Any]:
        """These batches, split among processes; those of the validation data if None.

        Raises:
            TrainingError: There are none.
        """
        batches = self._val_data if data is None else self._prepare_data(data)
        if batches is None:
            raise TrainingError(
                f"no validation data; pass val_data to {type(self).__name__}, or data here."
            )
        if isinstance(batches, ResumableData):
            # Every validation draws the same.
            batches.set_epoch(0)
        return batches

    def _pair(self, batch: Any, expected: str) -> tuple[Any, Any]:
        """The two parts of a batch.

        Raises:
            TrainingError: It has others.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TrainingError(f"a batch is {type(batch).__name__}; expected a pair {expected}.")
        return batch[0], batch[1]

    def _labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels on the device.

        Raises:
            TrainingError: Something else.
        """
        images, targets = self._moved(self._pair(batch, "(images, labels)"))
        if not isinstance(targets, Tensor):
            raise TrainingError(
                f"labels are {type(targets).__name__}; expected a tensor, one label an image."
            )
        return images, targets

    def _mean_of_processes(self, value: Tensor) -> Tensor:
        mean: Any = self.accelerator.reduce(value, reduction="mean")
        return mean

    def _moved(self, batch: Any) -> Any:
        """The same batch on the device."""
        return send_to_device(batch, self.accelerator.device)

    def _prepare_data(self, data: Iterable[Any]) -> Iterable[Any]:
        return engine.prepare_data(self.accelerator, data)

    def _progress_bar(self, position: Position) -> "tqdm[Any]":
        hidden = None if self._settings.progress is None else not self._settings.progress
        if not self.accelerator.is_main_process:
            hidden = True
        return tqdm(total=self.total_steps, initial=position.step, disable=hidden, unit="step")
