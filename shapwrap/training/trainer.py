"""The training loop, on accelerate: one process or many, CPU or GPU, without change."""

import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.errors import BackboneTypeError, TrainingError
from shapwrap.masking.batch_norm import batch_norms, evaluation_mode
from shapwrap.training import checkpoint
from shapwrap.training.config import TrainerConfig
from shapwrap.training.history import History
from shapwrap.training.objective import Objective, TaskLoss, Terms
from shapwrap.training.optimizer import make_optimizer, make_scheduler
from shapwrap.training.random_stream import RandomStream, global_states_kept
from shapwrap.training.validation import validate
from shapwrap.wrapper import ShapleyWrapper

Batch = tuple[Tensor, Tensor]


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
        self.accelerator = accelerator or _make_accelerator(self.config)
        self._directory = Path(self.config.output_dir) if self.config.output_dir else None
        self.history = History(self._directory if self.accelerator.is_main_process else None)
        self._batches_per_epoch = self._length(train_data)
        updates = math.ceil(self._batches_per_epoch / self.config.accumulation)
        self.total_steps = min(
            self.config.epochs * updates, self.config.max_steps or self.config.epochs * updates
        )
        optimizer = make_optimizer(wrapped, self.config)
        scheduler = make_scheduler(optimizer, self.config, self.total_steps)
        self.model = cast(nn.Module, self.accelerator.prepare_model(wrapped))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.scheduler = self.accelerator.prepare_scheduler(scheduler)
        self._train_data = self._prepare_data(train_data)
        self._val_data = None if val_data is None else self._prepare_data(val_data)

    # --- what a user calls --------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Trains; returns the history, one record a validation or `log_every` steps.

        Args:
            resume: Go on from the newest checkpoint in `output_dir`. On a CPU the result is bit
                for bit that of a run that never stopped.

        Raises:
            TrainingError: A loss is not finite, or there is nothing to resume.
        """
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
        """Accuracy, skill and residual (squared logits) on `data`, or on the validation data.

        Raises:
            TrainingError: There is no data.
        """
        batches = self._val_data if data is None else self._prepare_data(data)
        if batches is None:
            raise TrainingError("no validation data; pass val_data to Trainer, or data here.")
        return validate(self.model, self._on_device(batches), self.accelerator, self.config)

    def _fit(self, resume: bool) -> None:
        seed = self.config.seed + 1000 * self.accelerator.process_index
        position = checkpoint.Position(
            torch.Generator().manual_seed(seed), RandomStream(self.config.seed)
        )
        set_seed(seed)
        if resume:
            if self._directory is None:
                raise TrainingError("resume=True needs config.output_dir, where checkpoints lie.")
            checkpoint.load(self.accelerator, self._directory, position)
        self.history.start(keep=position.records)
        self.model.train()
        frozen = batch_norms(self.wrapped) if self.config.freeze_batch_norm else []
        with self._progress_bar(position) as bar, evaluation_mode(frozen):
            while position.step < self.total_steps:
                self._run_epoch(position, bar)

    # --- one epoch, one step ------------------------------------------------------------------

    def _run_epoch(self, position: checkpoint.Position, bar: "tqdm[Any]") -> None:
        skip = position.batch
        position.data_at_epoch_start = position.data.state
        window = _Window()
        index = -1
        for index, (images, targets) in self._epoch_batches(position):
            if index < skip:
                # Loaded and dropped: the data's random stream must pass through these draws.
                continue
            last = index + 1 == self._batches_per_epoch
            update = (index + 1) % self.config.accumulation == 0 or last
            terms = self._step(images, targets, position, update=update)
            window.add(terms)
            position.batch = index + 1
            if update:
                position.step += 1
                self._after_step(position, window, bar)
            if position.step >= self.total_steps:
                break
        if index < 0:
            raise TrainingError(
                f"epoch {position.epoch + 1} of the training data has no batch; expected an "
                "iterable that can be iterated once an epoch, not a used-up generator."
            )
        window.check(position.step)
        position.epoch += 1
        position.batch = 0
        position.data_at_epoch_start = position.data.state
        self._after_epoch(position, bar)

    def _step(
        self, images: Tensor, targets: Tensor, position: checkpoint.Position, *, update: bool
    ) -> Terms:
        synchronise = nullcontext() if update else self.accelerator.no_sync(self.model)
        with synchronise:
            terms = self._terms(images, targets, position)
            self.accelerator.backward(terms.total / self.config.accumulation)
        if update:
            if self.config.gradient_clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return terms

    def _terms(self, images: Tensor, targets: Tensor, position: checkpoint.Position) -> Terms:
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

    def _after_step(
        self, position: checkpoint.Position, window: "_Window", bar: "tqdm[Any]"
    ) -> None:
        bar.update()
        if position.step % self.config.log_every == 0:
            means = window.check(position.step)
            bar.set_description(f"epoch {position.epoch + 1} loss {means['loss']:.3f}")
            self.history.add(
                kind="train",
                step=position.step,
                epoch=position.epoch,
                learning_rate=self.scheduler.get_last_lr()[0],
                shapley_weight=self.objective.shapley_weight(position.step / self.total_steps),
                **means,
            )
        every = self.config.checkpoint_every
        if every is not None and position.step % every == 0:
            window.check(position.step)
            self._save(position)

    def _after_epoch(self, position: checkpoint.Position, bar: "tqdm[Any]") -> None:
        done = position.step >= self.total_steps
        due = done or position.epoch % self.config.validate_every == 0
        if self._val_data is not None and due:
            metrics = self.evaluate()
            bar.set_postfix(accuracy=f"{metrics['accuracy']:.3f}", skill=f"{metrics['skill']:.3f}")
            self.history.add(kind="validation", step=position.step, epoch=position.epoch, **metrics)
        if self.config.checkpoint_every is None or done:
            self._save(position)

    def _save(self, position: checkpoint.Position) -> None:
        if self._directory is not None:
            position.records = len(self.history.records)
            keep = self.config.keep_checkpoints
            checkpoint.save(self.accelerator, self._directory, position, keep)

    # --- data ---------------------------------------------------------------------------------

    def _epoch_batches(self, position: checkpoint.Position) -> Iterator[tuple[int, Batch]]:
        with position.data.active():
            batches = iter(self._on_device(self._train_data))
        for index in range(self._batches_per_epoch):
            with position.data.active():
                batch = next(batches, None)
            if batch is None:
                return
            yield index, batch

    def _on_device(self, data: Iterable[Any]) -> Iterator[Batch]:
        for batch in data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TrainingError(
                    f"a batch is {type(batch).__name__}; expected a pair (images, labels)."
                )
            images, targets = send_to_device(batch, self.accelerator.device)
            yield images, targets

    def _prepare_data(self, data: Iterable[Any]) -> Iterable[Any]:
        if isinstance(data, DataLoader):
            return self.accelerator.prepare_data_loader(data)
        if not isinstance(data, Iterable):
            raise TrainingError(
                f"the data is {type(data).__name__}; expected an iterable of (images, labels)."
            )
        if self.accelerator.num_processes > 1:
            raise TrainingError(
                f"the data is {type(data).__name__}; with {self.accelerator.num_processes} "
                "processes only a torch DataLoader can be split among them."
            )
        return data

    def _length(self, data: Iterable[Any]) -> int:
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        if not isinstance(data, Sized):
            raise TrainingError(
                f"the training data ({type(data).__name__}) has no length, which the schedules "
                "need; set TrainerConfig(steps_per_epoch=...)."
            )
        length = math.ceil(len(data) / self.accelerator.num_processes)
        if length == 0:
            raise TrainingError("the training data is empty; expected (images, labels) pairs.")
        return length

    def _progress_bar(self, position: checkpoint.Position) -> "tqdm[Any]":
        hidden = None if self.config.progress is None else not self.config.progress
        if not self.accelerator.is_main_process:
            hidden = True
        return tqdm(total=self.total_steps, initial=position.step, disable=hidden, unit="step")


def _make_accelerator(config: TrainerConfig) -> Accelerator:
    try:
        return Accelerator(
            # Without a word about the CPU, several processes would each train alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.precision,
            step_scheduler_with_optimizer=False,
            # A seed of the sampler's own would shuffle apart from the data's random stream.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )
    except ValueError as error:
        raise TrainingError(
            f"precision={config.precision!r} cannot be set up: {error} accelerate allows one "
            "precision a process, and fp16 only on a GPU; use a new process, or bf16."
        ) from error


class _Window:
    """Losses since the last look at them, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, terms: Terms) -> None:
        values = terms.detached()
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def check(self, step: int) -> dict[str, float]:
        """Means since the last check; raises if one is not finite."""
        if self._sum is None:
            return {}
        means = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        names = ("loss", "task_loss", "shapley_loss", "masked_task_loss")
        found: dict[str, float] = dict(zip(names, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise TrainingError(
                f"the loss is not finite at or just before step {step}: {found}; expected finite "
                "terms. Lower learning_rate or shapley_weight, use bf16 instead of fp16, and look "
                "for NaN in the images. The newest checkpoint is from before."
            )
        return found
