"""The pretrained head in three parts: layers after pooling, readout, classifier."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import PatchFeatures, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone
from shapwrap.errors import MissingHeadError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import compute_dtype
from shapwrap.readout.choose import choose_readout
from shapwrap.readout.classifier import LinearClassifier, check_head, split_head
from shapwrap.readout.readouts import Readout
from shapwrap.readout.trace import RanLayer, layers_that_run


class PreLogitLayers:
    """Everything between pooling and classifier, without dropout, in at least float32."""

    def __init__(self, backbone: Backbone, head: nn.Module | None, like: PooledFeatures):
        self.backbone = backbone
        self.head = head
        self._layers: list[RanLayer] = []
        owners = [backbone.model, *([head] if head is not None else [])]
        self._layers = layers_that_run(lambda: self(like), owners)

    def after_model(self, hidden: Tensor) -> Tensor:
        """The hidden layers of a head that was passed in, on what the model's classifier reads."""
        for layer in split_head(self.head)[0] if self.head is not None else []:
            hidden = layer(hidden)
        return hidden

    def __call__(self, pooled: PooledFeatures) -> PreLogits:
        """Pre-logits [M, D'] of pooled features [M, D].

        Dropout is left to `Head`, which shares one draw; batch statistics stay those of the clean
        images that were pooled, so both kinds of layer run in eval mode here.
        """
        precision = pooled.dtype
        layers = [layer.module() for layer in self._layers]
        with evaluation_mode([self.backbone.model, *layers]):
            hidden = self.backbone.pre_logits(pooled.to(self.backbone.parameter.dtype))
            hidden = self.after_model(hidden)
        return hidden.to(precision)


class ClassifierLayers:
    """The last layers: the model's own, or that of a head that was passed in."""

    def __init__(self, backbone: Backbone, head: nn.Module | None):
        self.backbone = backbone
        self.head = head

    def __call__(self) -> Sequence[nn.Module]:
        """One linear layer, or several to average."""
        if self.head is not None:
            return [split_head(self.head)[1]]
        layers = self.backbone.classifiers()
        if not layers:
            raise MissingHeadError(
                f"{type(self.backbone.model).__name__} has no classifier (its get_classifier() "
                "is empty or the identity); expected logits to explain. Pass "
                "head=nn.Linear(features, classes), or num_classes= for a new one."
            )
        return layers


class Head:
    """What turns patch features into logits and patch values."""

    def __init__(
        self, backbone: Backbone, head: nn.Module | None, like: PooledFeatures, readout: str
    ):
        if head is not None:
            check_head(head)
        self.classifier = LinearClassifier(ClassifierLayers(backbone, head))
        self.pre_logits = PreLogitLayers(backbone, head, like)
        owners = [backbone.model, *([head] if head is not None else [])]
        self.readout: Readout = choose_readout(self.pre_logits, owners, like, readout)
        self.dropout = backbone.classifier_dropout() if head is None else _head_dropout(head)

    def draw_dropout(self, features: PatchFeatures, *, training: bool) -> Tensor | None:
        """One draw of dropout an image, [B, 1, D'], for all its patches and coalitions.

        None where there is nothing to drop. Sharing the draw keeps efficiency exact in train mode
        and takes the noise out of v(s) - s . phi.
        """
        if not training or self.dropout == 0.0:
            return None
        width = self.classifier.num_features
        ones = features.new_ones(len(features), 1, width, dtype=compute_dtype(features))
        return functional.dropout(ones, self.dropout, training=True)


def new_head(backbone: Backbone, features: int, num_classes: int) -> nn.Linear:
    """A linear head that starts at zero, where the model lies: no random draw, no bias to undo."""
    parameter = backbone.parameter
    head = nn.Linear(features, num_classes, device=parameter.device, dtype=parameter.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _head_dropout(head: nn.Module) -> float:
    before = split_head(head)[0][-1:]
    return before[0].p if before and isinstance(before[0], nn.Dropout) else 0.0
