"""What is known of a wrapped model: its patches, its classes, what it says of nobody."""

import torch
from torch import Tensor, nn

from shapwrap._types import Grid
from shapwrap.backbones.base import Normalization
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import without_autocast
from shapwrap.values import game
from shapwrap.wrapping import Wrapping


class Facts:
    """The facts of a `ShapleyWrapper`, looked up where they lie."""

    _wrapping: Wrapping
    _class_names: list[str] | None
    new_head: nn.Module | None

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the size that the model was wrapped for."""
        return self._wrapping.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was wrapped for."""
        return self._wrapping.image_size

    @property
    def num_patches(self) -> int:
        """N, rows times columns."""
        return self.grid[0] * self.grid[1]

    @property
    def num_classes(self) -> int:
        """K."""
        return self._wrapping.head.classifier.num_classes

    @property
    def baseline(self) -> float | Tensor:
        """Logits of nobody, [K], where the head reads a class token; else 0, an empty sum."""
        backbone, head = self._wrapping.backbone, self._wrapping.head
        with (
            evaluation_mode(backbone.model.modules()),
            torch.no_grad(),
            without_autocast(backbone.parameter),
        ):
            baseline = game.baseline_of(head)
        return 0.0 if baseline is None else baseline[0, 0]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the K classes, given or told by the model."""
        if self._class_names is not None or self.new_head is not None:
            return self._class_names
        return self._wrapping.backbone.class_names()

    @property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation of the channels, where the model tells."""
        return self._wrapping.backbone.normalization()

    @property
    def has_baseline(self) -> bool:
        """Whether nobody has logits of their own, because the head reads a class token."""
        return self._wrapping.head.reads_class_token
