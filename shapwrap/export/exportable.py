"""A wrapped model as a function of images alone: tensors in, two tensors out."""

from collections.abc import Sequence
from typing import Literal, TypedDict, cast, get_args

import torch
from torch import Tensor, nn

from shapwrap.backbones.base import Normalization
from shapwrap.clip.output import Embeddings
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.clip.texts import Texts, strings_of
from shapwrap.errors import ArgumentError, BackboneTypeError, ExportError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.readout.classifier import Classifier, LinearClassifier
from shapwrap.wrapper import ShapleyWrapper

Values = Literal["predicted", "all"]


class What(TypedDict, total=False):
    """What is exported; all may be left out but `texts` for a `ShapleyCLIP`."""

    values: Values | str
    """"predicted" for the values of each image's highest class, "all" for those of every class."""
    pixels: bool
    """Whether the graph takes pixels in [0, 1] and normalises them itself."""
    normalization: Normalization | tuple[Sequence[float], Sequence[float]] | None
    """Mean and standard deviation of the channels; by default those of the model."""
    texts: Texts | None
    """For a `ShapleyCLIP`: the texts that are its classes, encoded once."""
    class_names: Sequence[str] | None
    """Names for the metadata; by default those of the model, or the texts."""


class Exportable(nn.Module):
    """`forward(images)` gives (logits [B, K], values) of a wrapped model in eval mode.

    Values are [B, N] of the class with the highest logit, or [B, N, K] of all classes. They sum
    over patches to the logits minus `baseline`, a buffer [K], 0 where nobody has no logits of
    their own. Weights are shared with the wrapped model; baseline and texts are as they were when
    this was made. Nothing is checked and nothing remembered in between, so that all of it traces;
    whatever the modes of the model are, they do not matter here and stay.
    """

    baseline: Tensor
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        source: ShapleyWrapper | ShapleyCLIP,
        *,
        values: Values,
        pixels: bool,
        normalization: Normalization | None,
        text_features: Embeddings | None,
        class_names: list[str] | None,
    ):
        super().__init__()
        # Not a submodule: the text tower of an image-text model has no part in this.
        object.__setattr__(self, "source", source)
        self.source: ShapleyWrapper | ShapleyCLIP
        self.wrapped = source.tower if isinstance(source, ShapleyCLIP) else source
        self.values = values
        self.pixels = pixels
        self.normalization = normalization
        self.class_names = class_names
        self.text_layer = None if text_features is None else _layer_of(text_features)
        self.register_buffer("baseline", self._baseline())
        like = self.wrapped._wrapping.backbone.parameter
        for name in ("mean", "std"):
            statistic = None
            if pixels and normalization is not None:
                statistic = torch.tensor(getattr(normalization, name)).to(like)[:, None, None]
            self.register_buffer(name, statistic)
        self.training = False

    @property
    def text_features(self) -> Embeddings | None:
        """Unit embeddings of the texts [K, E], where classes are texts."""
        return None if self.text_layer is None else self.text_layer.weight

    @property
    def num_classes(self) -> int:
        """K: classes, or texts."""
        return len(self.baseline)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K], and values [B, N] or [B, N, K], in at least float32."""
        wrapping, classifier = self.wrapped._wrapping, self._classifier()
        with evaluation_mode(self.modules()):
            features = wrapping.backbone.features(self.normalized(images)).features
            readout = wrapping.head.readout
            scores = readout.patch_scores(readout.embed(features))
            logits = classifier(scores.mean(dim=1))
            if self.values == "all":
                gains = classifier(scores) - self.baseline
            else:
                target = logits.argmax(dim=1)
                own = classifier.of_target(scores, target, contrast=False)
                gains = own - self.baseline[target][:, None]
        return logits, gains / features.shape[1]

    def normalized(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        if self.mean is None or self.std is None:
            return images
        return (images - self.mean) / self.std

    def _classifier(self) -> Classifier:
        layer = self.text_layer
        if layer is None:
            return self.wrapped._wrapping.head.classifier
        return LinearClassifier(lambda: [layer])

    def _baseline(self) -> Tensor:
        layer, baseline = self.text_layer, self.wrapped.baseline
        if isinstance(baseline, Tensor):
            return baseline.clone()
        if layer is not None:
            return layer.weight.new_zeros(len(layer.weight))
        parameter = self.wrapped._wrapping.backbone.parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros(self.wrapped.num_classes, dtype=dtype, device=parameter.device)


def exportable(
    wrapped: ShapleyWrapper | ShapleyCLIP,
    *,
    values: Values | str = "predicted",
    pixels: bool = False,
    normalization: Normalization | tuple[Sequence[float], Sequence[float]] | None = None,
    texts: Texts | None = None,
    class_names: Sequence[str] | None = None,
) -> Exportable:
    """A plain module from images to (logits, values), for `torch.export` and whatever traces.

    Args:
        wrapped: A wrapped classifier, or a `ShapleyCLIP`, whose logits are then similarities with
            `texts`. For CLIP's own scale export `clip.classifier(texts)`.
        values: "predicted" gives [B, N], the class with the highest logit; "all" [B, N, K].
        pixels: Take pixels in [0, 1] and normalise them in the graph.
        normalization: Mean and standard deviation of the channels; by default those of the model.
        texts: For a `ShapleyCLIP`: strings, token ids [K, L] or embeddings [K, E].
        class_names: Names for the metadata; by default those of the model, or the texts.

    Raises:
        BackboneTypeError: Not a wrapped model, or one that was unwrapped.
        ArgumentError: An unknown `values`, texts for a classifier or none for a `ShapleyCLIP`, not
            one name a class, or not one mean and one deviation a channel.
        ExportError: `pixels` without known statistics.
    """
    if not isinstance(wrapped, ShapleyWrapper | ShapleyCLIP):
        raise BackboneTypeError(
            f"wrapped is {type(wrapped).__name__}; expected a ShapleyWrapper or a ShapleyCLIP. "
            "Wrap the model first: ShapleyWrapper(model)."
        )
    tower = wrapped.tower if isinstance(wrapped, ShapleyCLIP) else wrapped
    tower._check_in_use()
    if values not in get_args(Values):
        raise ArgumentError(f"values is {values!r}; expected 'predicted' or 'all'.")
    statistics = _statistics(tower, normalization, pixels)
    features, names = None, None
    if isinstance(wrapped, ShapleyCLIP):
        if texts is None:
            raise ArgumentError(
                "wrapped is a ShapleyCLIP and there are no texts; expected those that the exported "
                "graph is to compare images with: texts=[...]."
            )
        with torch.no_grad(), evaluation_mode(wrapped.modules()):
            features = wrapped.text_features(texts).detach().clone()
        names = strings_of(texts)
    elif texts is not None:
        raise ArgumentError("texts came with a classifier; expected them with a ShapleyCLIP alone.")
    else:
        names = wrapped.class_names
    names = names if class_names is None else [str(name) for name in class_names]
    made = Exportable(
        wrapped,
        values=cast(Values, values),
        pixels=pixels,
        normalization=statistics,
        text_features=features,
        class_names=None if names is None else list(names),
    )
    if names is not None and len(names) != made.num_classes:
        raise ArgumentError(
            f"class_names has {len(names)} names; expected {made.num_classes}, one a class."
        )
    return made


def _statistics(
    tower: ShapleyWrapper,
    given: Normalization | tuple[Sequence[float], Sequence[float]] | None,
    pixels: bool,
) -> Normalization | None:
    """Those that were given, else those of the model."""
    if given is None:
        found = tower.normalization
        if found is None and pixels:
            raise ExportError(
                "pixels=True, and the model does not tell its mean and standard deviation; "
                "expected normalization=(mean, std), one number a channel each."
            )
        return found
    channels = tower._wrapping.backbone.in_channels()
    mean, std = (tuple(float(number) for number in numbers) for numbers in given)
    if len(mean) != channels or len(std) != channels or not all(number > 0 for number in std):
        raise ArgumentError(
            f"normalization is {given!r}; expected (mean, std) of {channels} numbers each, one a "
            "channel, with std above 0."
        )
    return Normalization(mean, std)


def _layer_of(text_features: Embeddings) -> nn.Linear:
    """Products with every text, as a linear layer without a bias."""
    width, num_texts = text_features.shape[1], text_features.shape[0]
    layer = nn.Linear(width, num_texts, bias=False, device="meta")
    layer.weight = nn.Parameter(text_features, requires_grad=False)
    return layer
