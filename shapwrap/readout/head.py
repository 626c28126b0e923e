"""The pretrained head in three parts: layers after pooling, readout, classifier."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import PatchFeatures, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.classifiers import is_linear
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.backbones.whole_model import WholeModel
from shapwrap.errors import MissingHeadError, ReadoutError, UnsupportedBackboneError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import compute_dtype
from shapwrap.readout.choose import choose_readout
from shapwrap.readout.class_token import ClassTokenReadout
from shapwrap.readout.classifier import (
    Classifier,
    ClassScores,
    LinearClassifier,
    check_head,
    split_head,
)
from shapwrap.readout.readouts import CosineReadout, EfficiencyGapReadout, Readout
from shapwrap.readout.trace import RanLayer, layers_that_run


class PreLogitLayers:
    """Everything between pooling and classifier, without dropout, in at least float32.

    With `complete`, the classifier is part of it.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module | None, like: PooledFeatures, *, complete: bool
    ):
        self.backbone = backbone
        self.head = head
        self.complete = complete
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
        if self.complete and self.head is None:
            return self._run(self.backbone.class_scores, pooled)
        return self._run(lambda given: self.after_model(self.backbone.pre_logits(given)), pooled)

    def project(self, hidden: Tensor) -> PreLogits:
        """The last layers of these alone: a projection, and the hidden layers of a new head."""
        return self._run(lambda given: self.after_model(self.backbone.project(given)), hidden)

    def _run(self, layers: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        precision = given.dtype
        ran = [layer.module() for layer in self._layers]
        with evaluation_mode([self.backbone.model, *ran]):
            return layers(given.to(self.backbone.parameter.dtype)).to(precision)


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
        if not layers and not self.backbone.gives_logits:
            raise MissingHeadError(
                f"{type(self.backbone.model).__name__} has no classifier (none, or an empty one, "
                "comes last); expected logits to explain. Pass head=nn.Linear(features, classes), "
                "or num_classes= for a new one; if what it returns are class scores, "
                "head=nn.Identity()."
            )
        return layers


class Head:
    """What turns patch features into logits and patch values."""

    def __init__(
        self, backbone: Backbone, head: nn.Module | None, like: PooledFeatures, readout: str
    ):
        if head is not None:
            check_head(head)
        width = like.shape[-1]
        like = backbone.read_by_head(like)
        layers = ClassifierLayers(backbone, head)
        complete = not all(is_linear(layer) for layer in layers())
        if backbone.gives_logits:
            complete = True
            if head is not None:
                raise ReadoutError(
                    f"head= cannot replace the classifier of {type(backbone.model).__name__}, "
                    "which is no single linear layer at its end; expected one. Build the model "
                    "for the classes that you want, and leave head= and num_classes= out."
                )
        self.pre_logits = PreLogitLayers(backbone, head, like, complete=complete)
        if complete:
            num_classes = self.pre_logits(like).shape[1]
            self.classifier: Classifier = ClassScores(layers, num_classes)
        else:
            self.classifier = LinearClassifier(layers)
        self.patch_layer: nn.Linear | None = None
        if isinstance(backbone, WholeModel):
            self.readout: Readout = self._share_output(backbone, like, readout)
        elif isinstance(backbone, TokenBackbone) and backbone.reads_class_token:
            own_width = width - like.shape[-1]
            self.patch_layer = self._new_patch_layer(backbone, own_width)
            self.readout = ClassTokenReadout(
                backbone, self.pre_logits, own_width, self.patch_layer, head
            )
        else:
            owners = [backbone.model, *([head] if head is not None else [])]
            project = None if complete else self.pre_logits.project
            self.readout = choose_readout(self.pre_logits, owners, like, readout, project)
        self.dropout = backbone.classifier_dropout() if head is None else _head_dropout(head)
        if complete:
            # Its place is between layers that are run as one.
            self.dropout = 0.0

    @property
    def reads_logits(self) -> bool:
        """Whether the patch scores are class scores, the classifier being part of the layers."""
        return isinstance(self.classifier, ClassScores)

    @property
    def reads_class_token(self) -> bool:
        """Whether the pretrained head still reads the class token."""
        return isinstance(self.readout, ClassTokenReadout)

    def read_cosines(self, backbone: Backbone) -> None:
        """From now on each patch is read by the direction of its own embedding.

        Raises:
            UnsupportedBackboneError: The backbone is kept whole: its patches have no embeddings.
            ReadoutError: The layers already end in class scores.
        """
        name = type(backbone.model).__name__
        if isinstance(backbone, WholeModel):
            raise UnsupportedBackboneError(
                f"{name} ({backbone.family}) has no embedding of single patches; "
                "readout='cosine' needs a tower that reads a mean, or an attention, of its patches."
            )
        if self.reads_logits and not isinstance(self.pre_logits.head, nn.Identity):
            raise ReadoutError(
                f"readout='cosine' compares embeddings, but the head of {name} gives class scores; "
                "expected a linear classifier, or head=nn.Identity() for embeddings themselves."
            )
        self.readout = CosineReadout(self.pre_logits)

    def parameters(self) -> list[nn.Parameter]:
        """Those of the classifier, and of the layer that shares out its output."""
        shared = [] if self.patch_layer is None else list(self.patch_layer.parameters())
        return self.classifier.parameters() + shared

    def _share_output(self, backbone: WholeModel, like: PooledFeatures, readout: str) -> Readout:
        if readout not in ("auto", EfficiencyGapReadout.name):
            raise ReadoutError(
                f"readout={readout!r} is not exact for {type(backbone.model).__name__}, whose head "
                "reads no mean of its patches. Use readout='auto', or 'efficiency-gap'."
            )
        width = backbone.own_width(like)
        self.patch_layer = self._new_patch_layer(backbone, width)
        return EfficiencyGapReadout(self.pre_logits, width, self.patch_layer)

    def _new_patch_layer(self, backbone: Backbone, width: int) -> nn.Linear:
        return new_layer(backbone, width, self.classifier.num_features, bias=False)

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
    return new_layer(backbone, features, num_classes, bias=True)


def new_layer(backbone: Backbone, features: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A linear layer of zeros, where the model lies."""
    # Made without values: the usual initialisation would move the global random state.
    layer: Any = nn.utils.skip_init(nn.Linear, features, outputs, bias=bias)
    layer = layer.to(backbone.parameter)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _head_dropout(head: nn.Module) -> float:
    before = split_head(head)[0][-1:]
    return before[0].p if before and isinstance(before[0], nn.Dropout) else 0.0
