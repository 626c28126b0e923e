"""What one contrastive step minimises: open_clip's loss + lambda * Shapley loss over all pairs."""

from typing import NamedTuple, Self

from torch import Tensor

from shapwrap.clip.output import ContrastiveOutput, Embeddings
from shapwrap.errors import MissingDependencyError
from shapwrap.losses import shapley_loss
from shapwrap.masking.pooling import compute_dtype
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.gathering import gathered

try:
    from open_clip.loss import ClipLoss, SigLipLoss
except ImportError as error:
    raise MissingDependencyError(
        "contrastive training uses open_clip's losses; install it with "
        "pip install 'shapwrap[train,open-clip]'."
    ) from error


class Features(NamedTuple):
    """What a contrastive loss reads, in at least float32."""

    images: Embeddings
    texts: Embeddings
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, output: object) -> Self:
        """From whatever `ShapleyCLIP.forward` returned: with coalitions, a tuple, a dictionary."""
        if isinstance(output, dict):
            parts = [output[name] for name in ("image_features", "text_features", "logit_scale")]
            parts.append(output.get("logit_bias"))
        else:
            # The first four of a ContrastiveOutput are in the order of open_clip's tuple.
            parts = [*tuple(output)[:4], None][:4]  # pyright: ignore[reportArgumentType]
        images, texts, scale, bias = parts
        # The towers may have run in half precision: texts always, images of a plain model.
        dtype = compute_dtype(images)
        return cls(images.to(dtype), texts.to(dtype), scale, bias)


class ContrastiveObjective:
    """Contrastive loss + lambda * Shapley loss, of this process's share of the global batch.

    The mean over processes is the loss of one process with the global batch, and so are the
    gradients that DDP averages: features are gathered with their gradients.

    Args:
        config: The loss and its weights.
        rank: Of this process.
        world_size: Number of processes; 1 needs no process group.
    """

    def __init__(self, config: ContrastiveConfig, *, rank: int = 0, world_size: int = 1):
        self.config = config
        self._world_size = world_size
        if config.loss == "clip":
            # Each process scores its own rows against all columns, not all against all.
            self._loss = ClipLoss(
                local_loss=world_size > 1,
                gather_with_grad=world_size > 1,
                rank=rank,
                world_size=world_size,
            )
        else:
            self._loss = SigLipLoss(rank=rank, world_size=world_size)

    @property
    def needs_coalitions(self) -> bool:
        """Whether any term reads the masked branch."""
        return self.config.shapley_weight != 0

    def contrastive(self, features: Features) -> Tensor:
        """The task loss: matching pairs against all others of the global batch."""
        return self._loss(features.images, features.texts, features.scale, features.bias)

    def shapley(self, output: ContrastiveOutput, texts: Embeddings) -> Tensor:
        """Mean of (v(s) - s . phi)^2 over images, coalitions and all texts of the global batch.

        In squared similarities: the classes of the game are the texts.
        """
        everybodys = gathered(texts) if self._world_size > 1 else texts
        return shapley_loss(output.for_texts(everybodys))

    def __call__(self, output: object, progress: float) -> dict[str, Tensor]:
        """All terms of one batch; `progress` is the share of the steps that are done.

        Args:
            output: What `ShapleyCLIP.forward` returned; a `ContrastiveOutput` has a Shapley term.
            progress: 0 to 1, for the ramp of lambda.
        """
        features = Features.of(output)
        contrastive = self.contrastive(features)
        terms = {"loss": contrastive, "contrastive_loss": contrastive}
        if isinstance(output, ContrastiveOutput):
            shapley = self.shapley(output, features.texts)
            terms["loss"] = contrastive + self.config.ramped_weight(progress) * shapley
            terms["shapley_loss"] = shapley
        return terms
