"""What a comparison compares: one YAML file, read into frozen dataclasses."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shapwrap.comparison.schema import ROOT, Pair, check_keys, from_mapping, mapping
from shapwrap.errors import ConfigurationError, MissingDependencyError

ModelKind = Literal["plain", "wrapped"]

CHANNELS = 3
"""Of the images that data sets give."""

MODEL_GROUPS = ("all", "plain", "wrapped")
"""What `models` of a method may say instead of names."""


@dataclass(frozen=True)
class DataConfig:
    """Images to train on and images to explain."""

    kind: str
    """A known kind of data (`shapwrap compare --list`), or "module:function" of your own."""
    root: str | None = None
    """Folder of the data, where the kind has one."""
    image_size: Pair = (224, 224)
    """Height and width in pixels, of every model."""
    train_images: int | None = None
    """At most this many, spread evenly over the data; all if null."""
    eval_images: int | None = None
    """Images that are explained and measured; all if null."""
    accuracy_images: int | None = None
    """Images of the same split that accuracy is measured on; those that are explained if null."""
    workers: int = 0
    """Processes that load training images."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the kind."""


@dataclass(frozen=True)
class ModelConfig:
    """One row of Table 1."""

    name: str
    """As in tables."""
    model: str
    """timm name, torchvision:NAME, efficientnet_lite0, or "module:function" of your own."""
    kind: ModelKind = "plain"
    """"wrapped" for a ShapleyWrapper around it."""
    weights: str | None = None
    """File of pretrained weights, without the new classifier."""
    pretrained: bool = False
    """Pretrained weights of the library's hub."""
    checkpoint: str | None = None
    """File of finished weights, classifier included."""
    start: str | None = None
    """Name of a plain model above, whose trained weights this one starts from."""
    num_classes: int | None = None
    """Classes of the model; those of the data if null."""
    grid: Pair | None = None
    """Patches: of the wrapped model; for a plain one, of every method that explains patches."""
    mean: tuple[float, ...] | None = None
    """Of the channels; by default the model's own, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Of the channels."""
    training: tuple[dict[str, Any], ...] = ()
    """Stages, one after the other; none trains nothing."""
    wrapper: dict[str, Any] = field(default_factory=dict)
    """Further options of ShapleyWrapper: masking, readout, prefix_tokens."""


@dataclass(frozen=True)
class MethodConfig:
    """One row of Table 2, for each model that it is applied to."""

    name: str
    """As in tables."""
    method: str = ""
    """A known method, or "module:class" of your own; the name if left out."""
    models: str | tuple[str, ...] = "all"
    """"all", "plain", "wrapped", or names of models."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the method's class."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of its training, for a method that learns."""


@dataclass(frozen=True)
class MetricConfig:
    """Some columns."""

    name: str
    """As in tables."""
    metric: str = ""
    """A known metric, or "module:function" of your own; the name if left out."""
    images: int | None = None
    """Only the first so many images, for a metric that costs much; all if null."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the metric."""


@dataclass(frozen=True)
class FigureConfig:
    """What is drawn."""

    images: int = 6
    """Rows of the figure of maps; 0 for none."""
    curves: bool = True
    """Draw the curves of metrics that have some."""


@dataclass(frozen=True)
class ComparisonConfig:
    """Models x methods x metrics on a data set."""

    data: DataConfig
    models: tuple[ModelConfig, ...]
    methods: tuple[MethodConfig, ...]
    metrics: tuple[MetricConfig, ...]
    seed: int = 0
    """Of training, of methods and of metrics that draw."""
    device: str = "auto"
    """cpu, cuda, mps; "auto" takes what there is."""
    batch_size: int = 16
    """Images explained and measured at a time."""
    chunk_size: int = 64
    """Perturbed copies that go through a model at a time."""
    out: str = "runs/compare"
    figures: FigureConfig = FigureConfig()

    def __post_init__(self) -> None:
        """Check what no single key can tell."""
        for name in ("models", "methods", "metrics"):
            labels = [slug(part.name) for part in getattr(self, name)]
            if not labels:
                raise ConfigurationError(f"{name} is empty; expected at least one.")
            if "" in labels:
                raise ConfigurationError(
                    f"{name}: {getattr(self, name)[labels.index('')].name!r} is no name; expected "
                    "one with letters or digits, since results are filed under it."
                )
            label, count = Counter(labels).most_common(1)[0]
            if count > 1:
                raise ConfigurationError(
                    f"{name}: {count} of them are called {label!r}; expected a name of its own for "
                    "each (two may have the same model, method and other options)."
                )
        for name in ("batch_size", "chunk_size"):
            _at_least_one(getattr(self, name), name)
        for name in ("train_images", "eval_images", "accuracy_images"):
            _at_least_one(getattr(self.data, name), f"data.{name}")
        for metric in self.metrics:
            _at_least_one(metric.images, f"metrics.{metric.name}.images")
        if self.seed < 0:
            raise ConfigurationError(f"seed is {self.seed}; expected 0 or more.")
        if self.figures.images < 0:
            raise ConfigurationError(
                f"figures.images is {self.figures.images}; expected 0 or more."
            )
        names = [model.name for model in self.models]
        for method in self.methods:
            if method.models not in MODEL_GROUPS:
                asked = (method.models,) if isinstance(method.models, str) else method.models
                check_keys(asked, [*names, *MODEL_GROUPS], f"methods.{method.name}.models")
        for index, model in enumerate(self.models):
            _check_model(model)
            if model.start is not None:
                above = [other.name for other in self.models[:index] if other.kind == "plain"]
                check_keys([model.start], above, f"models.{model.name}.start")


def slug(label: str) -> str:
    """A label as a file name; letters of any script are kept."""
    return re.sub(r"[^\w.+]+", "-", label).strip("-.").lower()


def read_config(source: str | Path) -> ComparisonConfig:
    """The configuration in a YAML file.

    Raises:
        ConfigurationError: No such file, no YAML, or something in it that cannot be meant.
        MissingDependencyError: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "configuration files need pyyaml; run: pip install 'shapwrap[compare]'"
        ) from error
    path = Path(source)
    if not path.is_file():
        raise ConfigurationError(f"{path} is no file; expected a configuration in YAML.")
    try:
        return parse_config(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def parse_config(given: object) -> ComparisonConfig:
    """The configuration that a mapping holds.

    Raises:
        ConfigurationError: Something in it cannot be meant.
    """
    values = mapping(given, ROOT)
    prepared = dict(values)
    if "models" in values:
        prepared["models"] = [_model(m, i) for i, m in enumerate(_items(values, "models"))]
    if "methods" in values:
        prepared["methods"] = [
            {"name": m} if isinstance(m, str) else m for m in _items(values, "methods")
        ]
    if "metrics" in values:
        prepared["metrics"] = _metrics(values["metrics"])
    made = from_mapping(ComparisonConfig, prepared, ROOT)
    methods = tuple(
        method if method.method else replace(method, method=method.name) for method in made.methods
    )
    metrics = tuple(
        metric if metric.metric else replace(metric, metric=metric.name) for metric in made.metrics
    )
    return replace(made, methods=methods, metrics=metrics)


def _items(values: Mapping[str, Any], name: str) -> Sequence[Any]:
    if not isinstance(values[name], list | tuple):
        raise ConfigurationError(f"{name} is {values[name]!r}; expected a list.")
    return values[name]


def _model(given: Any, index: int) -> dict[str, Any]:
    """`model` is the name where it is left out, and one stage of training is a list of one."""
    values = mapping({"name": given} if isinstance(given, str) else given, f"models[{index}]")
    if "name" in values:
        values.setdefault("model", values["name"])
    training = values.get("training")
    if training is None:
        values.pop("training", None)
    elif not isinstance(training, list | tuple):
        values["training"] = [training]
    return values


def _metrics(given: Any) -> list[Any]:
    """Names, or names with options: `faithfulness: {fill: mean}`."""
    if isinstance(given, list | tuple):
        return [{"name": name} if isinstance(name, str) else name for name in given]
    parts = []
    for name, options in mapping(given, "metrics").items():
        values = mapping(options, f"metrics.{name}")
        ours = {key: values.pop(key) for key in ("metric", "images") if key in values}
        parts.append({"name": name, "options": values, **ours})
    return parts


def _check_model(model: ModelConfig) -> None:
    where = f"models.{model.name}"
    sources = (model.weights, model.checkpoint, model.start, model.pretrained or None)
    if sum(source is not None for source in sources) > 1:
        raise ConfigurationError(
            f"{where} has more than one of weights, pretrained, checkpoint and start; expected one "
            "source."
        )
    if model.checkpoint is not None and model.training:
        raise ConfigurationError(
            f"{where} has a checkpoint and training; a checkpoint is finished. Use weights for a "
            "start."
        )
    if model.wrapper and model.kind != "wrapped":
        raise ConfigurationError(f"{where} has options of the wrapper; expected kind: wrapped.")
    if (model.mean is None) != (model.std is None):
        raise ConfigurationError(f"{where} has one of mean and std; expected both or neither.")
    if model.mean is None or model.std is None:
        return
    if len(model.mean) != CHANNELS or len(model.std) != CHANNELS or min(model.std) <= 0:
        raise ConfigurationError(
            f"{where} has mean {list(model.mean)} and std {list(model.std)}; expected one number "
            "for each of 3 channels, and a std above 0."
        )


def _at_least_one(value: int | None, where: str) -> None:
    if value is not None and value < 1:
        raise ConfigurationError(f"{where} is {value}; expected at least 1.")
