"""Contrastive training of a wrapped image-text model."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shapwrap.backbones.image_text import reads_texts
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.clip.texts import tokens_of
from shapwrap.errors import ArgumentError, BackboneTypeError, TrainingError
from shapwrap.training import engine
from shapwrap.training.config import config_of_kind
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.contrastive_objective import ContrastiveObjective
from shapwrap.training.contrastive_validation import validate_contrastive
from shapwrap.training.fresh_coalitions import fresh_coalitions
from shapwrap.training.loop import Loop
from shapwrap.training.position import Position

LARGEST_SCALE = math.log(100)


class ContrastiveTrainer(Loop):
    """Trains an image-text model so that its patch-text values become Shapley values.

    Contrastive loss of the similarities + lambda * Shapley loss over all image-text pairs. The
    texts of all processes are compared with; those of one batch only, not of the batches that
    `accumulation` puts together.

    Args:
        clip: The wrapped model; trained in place. With `shapley_weight=0` also a plain image-text
            model, to compare with: same loss, same schedule, no game.
        train_data: Any iterable of (images, token ids [B, L]) that can be iterated once an epoch: a
            DataLoader, `shapwrap.data.ImageTextShards`, a list of batches. Strings will do where
            `clip` has a tokenizer. All batches of a step must be of one size in all processes;
            DataLoaders see to that, and `drop_last=True` keeps repeated pairs out.
        val_data: The same for validation.
        config: Settings.
        head: Parameters that learn faster, by `head_multiplier`, such as a new projection; none by
            default.
        accelerator: One of your own, for trackers or plugins; made from `config` by default.

    Raises:
        BackboneTypeError: `clip` is no image-text model.
        ArgumentError: SigLIP's loss for a model without a logit bias, a Shapley weight for one
            that is not wrapped, or a configuration of another kind.
        TrainingError: The data is not iterable, has no length and `steps_per_epoch` is unset, or
            all parameters are frozen.
    """

    def __init__(
        self,
        clip: ShapleyCLIP | nn.Module,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        config: ContrastiveConfig | None = None,
        head: Iterable[nn.Parameter] | None = None,
        accelerator: Accelerator | None = None,
    ):
        if not reads_texts(clip):
            raise BackboneTypeError(
                f"clip is {type(clip).__name__}; expected ShapleyCLIP(model). Train a "
                "ShapleyWrapper with Trainer."
            )
        self.config = config_of_kind(config, ContrastiveConfig)
        self.clip = clip if isinstance(clip, ShapleyCLIP) else None
        self._towers: Any = clip.model if isinstance(clip, ShapleyCLIP) else clip
        if self.clip is None and self.config.shapley_weight != 0:
            raise ArgumentError(
                f"shapley_weight is {self.config.shapley_weight}, but {type(clip).__name__} has no "
                "patch values; expected ShapleyCLIP(model), or shapley_weight=0 for a plain model."
            )
        if self.config.loss == "siglip" and getattr(self._towers, "logit_bias", None) is None:
            raise ArgumentError(
                f"loss is 'siglip', but {type(self._towers).__name__} has no logit bias; make it "
                "with init_logit_bias=-10.0, or use loss='clip'."
            )
        with self._text_frozen():
            super().__init__(
                clip, train_data, val_data, config=self.config, head=head, accelerator=accelerator
            )
        self.objective = ContrastiveObjective(
            self.config,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def fit(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Trains; returns the history, one record a validation or `log_every` steps.

        Records of kind "train" hold step, epoch, learning_rate, shapley_weight, logit_scale and
        the means over steps and processes of loss, contrastive_loss and shapley_loss (squared
        similarities; absent with weight 0); those of kind "validation" what `evaluate` returns.

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
        with self._text_frozen():
            return super().fit(resume=resume)

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, float]:
        """Means over all images, and their number.

        contrastive_loss, image_to_text_r1 and text_to_image_r1 compare within a batch (of all
        processes), so they depend on its size; skill, residual and trivial_residual (squared
        similarities) are over the texts of a batch, and absent for a plain model.

        Args:
            data: Batches of (images, token ids); the validation data if None.

        Raises:
            TrainingError: There is no data.
        """
        batches = self._validation_batches(data)
        return validate_contrastive(
            self.model,
            self.clip,
            self._on_device(batches),
            self.accelerator,
            self.config,
            split=isinstance(batches, DataLoader),
            autocast=lambda: engine.autocast(self.accelerator, self.config),
        )

    # --- one step -----------------------------------------------------------------------------

    def _validate(self) -> dict[str, float] | None:
        return None if self._val_data is None else self.evaluate()

    def _terms(self, batch: tuple[Tensor, Tensor], position: Position) -> dict[str, Tensor]:
        images, texts = batch
        with engine.autocast(self.accelerator, self.config):
            if self.clip is not None and self.objective.needs_coalitions:
                coalitions = fresh_coalitions(
                    self.clip,
                    images,
                    self.config.num_coalitions,
                    self.config.distribution,
                    position.coalitions,
                )
                output = self.model(images, texts, coalitions, paired=True)
            else:
                output = self.model(images, texts)
        return self.objective(output, position.step / self.total_steps)

    def _step(self, batch: Any, position: Position, *, update: bool) -> dict[str, Tensor]:
        terms = super()._step(batch, position, update=update)
        scale: Any = self._towers.logit_scale
        if update and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(0, LARGEST_SCALE)
        return terms

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, texts = self._pair(batch, "(images, token ids)")
        if not isinstance(images, Tensor):
            raise TrainingError(f"images are {type(images).__name__}; expected a tensor.")
        tokens = tokens_of(texts, None if self.clip is None else self.clip.tokenizer)
        if len(images) != len(tokens):
            raise TrainingError(
                f"a batch has {len(images)} images and {len(tokens)} texts; expected one text an "
                "image."
            )
        return self._moved((images, tokens))

    def _state_of_loss(self, position: Position) -> dict[str, float]:
        done = (position.step - 1) / self.total_steps
        scale: Any = self._towers.logit_scale
        return {
            "shapley_weight": self.config.ramped_weight(done),
            "logit_scale": float(scale.detach().exp().mean()),
        }

    # --- the text tower -----------------------------------------------------------------------

    def _frozen(self) -> list[nn.Module]:
        return super()._frozen() + ([] if self.config.train_text else self._text_modules())

    def _text_modules(self) -> list[nn.Module]:
        """Everything but the image tower, and what holds both."""
        model = self._towers
        image_side = {id(module) for module in model.visual.modules()} | {id(model)}
        return [module for module in model.modules() if id(module) not in image_side]

    @contextmanager
    def _text_frozen(self) -> Iterator[None]:
        """Inside, no gradient is computed for the texts, and no graph kept, if they stay."""
        model = self._towers
        trained = [*model.visual.parameters(), model.logit_scale]
        if (bias := getattr(model, "logit_bias", None)) is not None:
            trained.append(bias)
        kept = {id(parameter) for parameter in trained}
        frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
        if self.config.train_text:
            frozen = []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
