"""Everything about a training run that can be chosen."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from typing_extensions import override

from shapwrap.coalitions.sampling import Distribution
from shapwrap.errors import ArgumentError

Precision = Literal["no", "bf16", "fp16"]
Trainable = Literal["all", "head"]
Config = TypeVar("Config", bound="LoopConfig")


@dataclass(frozen=True)
class LoopConfig:
    """Settings that every training loop has, of wrapped and of plain models.

    Raises:
        ArgumentError: A value outside its range.
    """

    output_dir: str | Path | None = None
    """Where checkpoints and `history.jsonl` go; nothing is written if None."""
    epochs: int = 5
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that comes first."""
    steps_per_epoch: int | None = None
    """Batches in an epoch, for data without a length; the schedules need it."""

    label_smoothing: float = 0.0
    """Of the cross-entropy on clean images."""
    learning_rate: float = 1e-4
    """Peak learning rate of the backbone."""
    head_multiplier: float = 10.0
    """Learning rate of the classifier, as a multiple of the backbone's."""
    weight_decay: float = 0.05
    """Of AdamW; biases, norms and tokens have none."""
    warmup: float = 0.1
    """Share of the steps with a linearly growing learning rate; a cosine to 0 follows."""
    gradient_clip: float | None = 1.0
    """Largest norm of the gradient; None for no clipping."""
    accumulation: int = 1
    """Batches an optimizer step."""
    precision: Precision = "no"
    """Autocast of the encoder; head and losses stay in float32."""
    trainable: Trainable = "all"
    """What learns: "head" for the head alone, its readout's layer included, on a backbone that
    stays as it is, in eval mode. Parameters that require no gradient never learn."""
    layer_decay: float | None = None
    """Learning rate of each layer as a multiple of that of the layer above it; the head has the
    full rate. None, as 1, for one rate for all layers."""
    ema_decay: float | None = None
    """Of an exponential moving average of the weights, which validation and the finished model
    have; None for no average."""
    mixup: float = 0.0
    """Alpha of mixup: two images blended, and their labels; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix: a box of one image in another, labels by area; 0 for none."""
    mixing_probability: float = 1.0
    """Share of the batches to which mixup or cutmix is done."""
    freeze_batch_norm: bool = True
    """Keep batch statistics as pretrained, so that both branches and inference share them."""

    seed: int = 0
    """Of coalitions, data order and dropout."""
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None for one at the end of each epoch."""
    keep_checkpoints: int = 2
    """How many of the newest are kept."""
    log_every: int = 10
    """Optimizer steps between records of the training losses; each waits for the device. At each,
    the weight of `shapley_weight="auto"` moves."""
    progress: bool | None = None
    """Show a progress bar; None for only on a terminal."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("epochs", "accumulation", "log_every", "validate_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("max_steps", "steps_per_epoch", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}; expected at least 1, or None."
                )
        self._check_not_negative("weight_decay", "learning_rate", "head_multiplier")
        self._check_not_negative("mixup", "cutmix")
        self._check_choices(precision=Precision, trainable=Trainable)
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise ArgumentError(
                f"gradient_clip is {self.gradient_clip}; expected more than 0, or None."
            )
        self._check_shares("warmup", "label_smoothing", "mixing_probability")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ArgumentError(
                f"layer_decay is {self.layer_decay}; expected more than 0 and at most 1, or None."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ArgumentError(
                f"ema_decay is {self.ema_decay}; expected between 0 and 1, such as 0.9998, or None."
            )

    def what_training_depends_on(self) -> dict[str, Any]:
        """All settings but those that only decide what is written, shown or stopped when."""
        free = {"output_dir", "progress", "log_every", "keep_checkpoints", "checkpoint_every"}
        free |= {
            "epochs",
            "max_steps",
            "steps_per_epoch",
            "validate_every",
            "validation_coalitions",
        }
        return {name: value for name, value in asdict(self).items() if name not in free}

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected 0 or more.")

    def _check_choices(self, **kinds: Any) -> None:
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise ArgumentError(
                    f"{name} is {getattr(self, name)!r}; expected one of {get_args(kind)}."
                )

    def _check_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected 0 to 1.")


@dataclass(frozen=True)
class ShapleyConfig(LoopConfig):
    """Settings of every loop that has a Shapley loss.

    Raises:
        ArgumentError: A value outside its range.
    """

    shapley_weight: float | Literal["auto"] = 100.0
    """Lambda of Eq. 14 at the end of its ramp, in 1 / logit^2. "auto", of a `Trainer`: as large as
    `max_accuracy_drop` allows, without a ramp."""
    shapley_ramp: float = 0.6
    """Share of the steps over which lambda grows linearly from 0."""
    num_coalitions: int = 2
    """Coalitions an image and step, in complement pairs."""
    distribution: Distribution = "shapley"
    """Of coalition sizes."""
    validation_coalitions: int = 2
    """Coalitions an image for skill, in complement pairs, the same ones each time."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("num_coalitions", "validation_coalitions"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}; expected an even number, at least 2: "
                    "coalitions come with their complements."
                )
        if self.shapley_weight != "auto":
            if not isinstance(self.shapley_weight, int | float):
                raise ArgumentError(
                    f"shapley_weight is {self.shapley_weight!r}; expected a number or 'auto'."
                )
            self._check_not_negative("shapley_weight")
        self._check_choices(distribution=Distribution)
        self._check_shares("shapley_ramp")

    @override
    def what_training_depends_on(self) -> dict[str, Any]:
        plan = super().what_training_depends_on()
        if self.shapley_weight == "auto":
            # It moves at each record, by means since the last record or checkpoint.
            plan |= {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        return plan

    def ramped_weight(self, progress: float) -> float:
        """Lambda after this share of the steps: a linear ramp, then constant.

        A fresh head has no signal to share out yet; with the full weight from the first step,
        uniform values would be learned before the task.
        """
        if self.shapley_weight == "auto":
            raise ArgumentError("shapley_weight is 'auto', which has no ramp; expected a number.")
        ramp = self.shapley_ramp
        return self.shapley_weight * (min(1.0, progress / ramp) if ramp > 0 else 1.0)


@dataclass(frozen=True)
class TrainerConfig(ShapleyConfig):
    """Settings of a `Trainer`; the defaults fine-tune a pretrained backbone.

    Raises:
        ArgumentError: A value outside its range.
    """

    masked_cross_entropy: float = 1.0
    """Weight of the task loss on v(s), the logits of masked images; 0 for none."""
    max_accuracy_drop: float = 0.0
    """With `shapley_weight="auto"`: by how much accuracy on the validation data may be below that
    of plain training with the same settings, as a share of the images."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._check_not_negative("masked_cross_entropy")
        self._check_shares("max_accuracy_drop")
        if self.max_accuracy_drop and self.shapley_weight != "auto":
            raise ArgumentError(
                f"max_accuracy_drop is {self.max_accuracy_drop}, which a fixed shapley_weight "
                f"({self.shapley_weight}) does not hold; expected shapley_weight='auto', or 0."
            )


def config_of_kind(config: object, kind: type[Config]) -> Config:
    """The settings, by default those of this kind.

    Raises:
        ArgumentError: They are of another kind of training.
    """
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise ArgumentError(f"config is {type(config).__name__}; expected {kind.__name__}(...).")
    return config
