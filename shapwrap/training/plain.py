"""Fine-tuning of a plain classifier, with the schedule of the Trainer: what is compared against."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shapwrap.backbones.whole_model import mean_output
from shapwrap.choosing import Request
from shapwrap.errors import ArgumentError, BackboneTypeError, ShapwrapError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.training import engine
from shapwrap.training.config import LoopConfig, config_of_kind
from shapwrap.training.loop import Loop
from shapwrap.training.mixing import Mixing
from shapwrap.training.objective import TaskLoss, cross_entropy
from shapwrap.training.position import Position
from shapwrap.training.validation import averaged
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.wrapping import wrap


def fine_tune(
    model: nn.Module,
    train_data: Iterable[Any],
    val_data: Iterable[Any] | None = None,
    *,
    config: LoopConfig | None = None,
    head: nn.Module | str | None = None,
    task_loss: TaskLoss | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """The history of a training run of a plain classifier, in place.

    AdamW, warm-up, cosine, clipping, checkpoints and random streams are those of `Trainer`; a
    `TrainerConfig` may be passed, of which the Shapley settings are not used.

    Args:
        model: Images [B, C, H, W] to logits [B, K]; not wrapped.
        train_data: Any iterable of (images, labels) that can be iterated once an epoch.
        val_data: The same for validation: records of kind "validation" hold accuracy and images.
        config: Settings.
        head: The classifier, which learns faster by `head_multiplier`, or its name; found in the
            model if None.
        task_loss: From logits [B, K] and labels to a scalar; cross-entropy by default.
        resume: Go on from the newest checkpoint in `output_dir`.
        accelerator: One of your own; made from `config` by default.

    Raises:
        BackboneTypeError: Not a module, or a wrapped model.
        ArgumentError: `head` is no part of the model, or is not found in it.
        TrainingError: What `Trainer` raises.
    """
    if not isinstance(model, nn.Module) or isinstance(model, ShapleyWrapper):
        raise BackboneTypeError(
            f"model is {type(model).__name__}; expected a plain nn.Module. Train a ShapleyWrapper "
            "with Trainer."
        )
    config = config_of_kind(config, LoopConfig)
    # With one rate for all there is no need to know.
    same = config.head_multiplier == 1 and config.layer_decay is None
    found = [] if same and config.trainable == "all" else _classifier(model, head)
    loop = _FineTuning(model, train_data, val_data, config, found, task_loss, accelerator)
    return loop.fit(resume=resume)


class _FineTuning(Loop):
    """One loss: that of the task."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None,
        config: LoopConfig,
        head: list[nn.Parameter],
        task_loss: TaskLoss | None,
        accelerator: Accelerator | None,
    ):
        super().__init__(
            model, train_data, val_data, config=config, head=head, accelerator=accelerator
        )
        self._task_loss = task_loss
        self._mixing = Mixing.of(config)

    def _terms(self, batch: tuple[Tensor, Tensor], position: Position) -> dict[str, Tensor]:
        images, targets = batch
        mixed = None if self._mixing is None else self._mixing(images, position.mixing())
        with engine.autocast(self.accelerator, self._settings):
            logits = mean_output(self.model(images if mixed is None else mixed.images))
        if mixed is not None:
            targets = mixed.targets(targets, logits.shape[1])
        # Losses stay in float32, as in the Trainer.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._task_loss is not None:
            return {"loss": self._task_loss(logits, targets)}
        return {"loss": cross_entropy(logits, targets, self._settings.label_smoothing)}

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self._labelled(batch)

    @torch.no_grad()
    def _validate(self) -> dict[str, float] | None:
        if self._val_data is None:
            return None
        batches = self._validation_batches()
        split = isinstance(batches, DataLoader)
        rows: list[Tensor] = []
        with evaluation_mode(self.model.modules()):
            for images, targets in self._on_device(batches):
                with engine.autocast(self.accelerator, self._settings):
                    predicted = mean_output(self.model(images)).argmax(dim=1)
                labels = targets.argmax(dim=1) if targets.ndim == 2 else targets
                row = (predicted == labels).to(torch.float32)
                # The last batch of a split loader is filled up with images seen before.
                gathered: Any = self.accelerator.gather_for_metrics(row) if split else row
                rows.append(gathered.cpu().double()[:, None])
        return averaged(rows, ["accuracy"], "(images, labels)")


def _classifier(model: nn.Module, head: nn.Module | str | None) -> list[nn.Parameter]:
    """Parameters of the classifier.

    Raises:
        ArgumentError: There is none of that name, or none is found.
    """
    if isinstance(head, str):
        try:
            head = model.get_submodule(head)
        except AttributeError as error:
            raise ArgumentError(
                f"head is {head!r}; expected the name of a part of the model ({error})."
            ) from error
    if head is None:
        try:
            modules = list(wrap(model, Request(), None)[0].backbone.classifiers())
        except ShapwrapError as error:
            raise ArgumentError(
                f"the classifier of {type(model).__name__} is not found ({error}); pass head=, or "
                "head_multiplier=1 for one learning rate."
            ) from error
        if not modules:
            raise ArgumentError(
                f"no classifier is found in {type(model).__name__}; pass head=, or "
                "head_multiplier=1 for one learning rate."
            )
    else:
        modules = [head]
    own = {id(parameter) for parameter in model.parameters()}
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if not parameters or any(id(parameter) not in own for parameter in parameters):
        raise ArgumentError(
            f"head is {head!r}; expected a part of the model that has parameters, or its name."
        )
    return parameters
