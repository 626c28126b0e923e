"""Models under test: built, trained where that was asked for, kept, and loaded again."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shapwrap._version import __version__
from shapwrap.backbones.base import Normalization
from shapwrap.comparison.config import ComparisonConfig, ModelConfig
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.registry import load
from shapwrap.comparison.store import Piece, Store, digest, file_digest
from shapwrap.comparison.training import train
from shapwrap.data.by_name import build_by_name, load_weights
from shapwrap.data.pretrained import efficientnet_lite0
from shapwrap.errors import ConfigurationError, ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.wrapper import ShapleyWrapper

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class PreparedModel:
    """A model under test, in eval mode, with what is known of it."""

    config: ModelConfig
    module: nn.Module
    normalization: Normalization
    made_from: dict[str, Any]
    facts: dict[str, Any]
    """How it was trained."""

    @property
    def name(self) -> str:
        """As in tables."""
        return self.config.name

    @property
    def wrapped(self) -> ShapleyWrapper | None:
        """The wrapped model, if it is one."""
        return self.module if isinstance(self.module, ShapleyWrapper) else None

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the model wants them."""
        mean, std = (
            torch.tensor(part, device=images.device)[:, None, None] for part in self.normalization
        )
        return (images - mean) / std


class ModelShelf:
    """The models of a comparison; each is built, trained or loaded on first use only.

    Args:
        config: The comparison.
        data: Its data.
        store: Where trained weights are kept.
        factories: Models of one's own, by the name that `model` of the configuration says.
        device: Where they explain.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        data: ComparisonData,
        store: Store,
        factories: Mapping[str, Factory],
        device: torch.device,
    ):
        self._config = config
        self._data = data
        self._store = store
        self._factories = factories
        self._device = device
        self._loaded: PreparedModel | None = None

    def made_from(self, model: ModelConfig) -> dict[str, Any]:
        """All that decides the weights of a model.

        Raises:
            ConfigurationError: A file of weights is missing.
        """
        settings = asdict(model)
        del settings["name"]
        files = {}
        for key in ("weights", "checkpoint"):
            path = settings[key]
            if path is not None:
                if not Path(path).is_file():
                    raise ConfigurationError(
                        f"models.{model.name}.{key} is {path}, which is no file; expected weights "
                        "(.safetensors or .pth)."
                    )
                files[key] = file_digest(path)
        start = None if model.start is None else digest(self.made_from(self._named(model.start)))
        return {
            "model": settings,
            "start": start,
            "files": files,
            "data": training_data(self._config) if model.training else None,
            "image_size": self._config.data.image_size,
            "classes": self._data.class_names,
            "seed": self._config.seed,
            "shapwrap": __version__,
        }

    def get(self, model: ModelConfig, progress: bool | None = None) -> PreparedModel:
        """The model, ready to explain; only the last one that was asked for stays in memory.

        Raises:
            ShapwrapError: It cannot be built, or trained.
        """
        if self._loaded is not None and self._loaded.config == model:
            return self._loaded
        self._loaded = None
        made_from = self.made_from(model)
        key = ("models", model.name)
        state = None
        if model.start is not None:
            state = self.get(self._named(model.start), progress).module.state_dict()
        module = self.build(model, state)
        normalization = normalization_of(model, module)
        piece = self._store.read(*key, made_from=made_from)
        if piece is None:
            facts: dict[str, Any] = {"normalization": normalization._asdict()}
            if model.training:
                folder, _ = self._store.working_folder(*key, made_from=made_from)
                facts["training"] = train(
                    module,
                    model.training,
                    lambda size: self._data.training_batches(normalization, size),
                    lambda size: self._data.training_and_control_batches(normalization, size),
                    folder=folder,
                    seed=self._config.seed,
                    progress=progress,
                )
            tensors = module.state_dict() if model.training else None
            piece = self._store.write(
                *key, piece=Piece("finished", made_from, facts), tensors=tensors
            )
            self._store.discard_working_folder(*key)
        elif model.training:
            module.load_state_dict(self._store.tensors(*key))
        module.to(self._device).eval()
        self._loaded = PreparedModel(model, module, normalization, made_from, piece.result)
        return self._loaded

    def is_trained(self, model: ModelConfig) -> bool:
        """Whether its trained weights are there."""
        return self._store.holds("models", model.name, made_from=self.made_from(model))

    def untrained(self, model: ModelConfig) -> PreparedModel:
        """The model as it is before training, to try what would be done with it.

        Raises:
            ShapwrapError: It cannot be built.
        """
        module = self.build(model).to(self._device).eval()
        return PreparedModel(
            model, module, normalization_of(model, module), self.made_from(model), {}
        )

    def _named(self, name: str) -> ModelConfig:
        return next(model for model in self._config.models if model.name == name)

    def build(
        self, model: ModelConfig, start: Mapping[str, torch.Tensor] | None = None
    ) -> nn.Module:
        """The model before training; a new classifier is drawn from the seed.

        Args:
            model: Which one.
            start: Weights of the plain model that it starts from.

        Raises:
            ShapwrapError: It cannot be built so.
        """
        classes = model.num_classes or len(self._data.class_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.seed)
            module = self._bare(model, classes)
            if start is not None:
                self._load_start(model, module, start)
            if model.kind == "wrapped" and not isinstance(module, ShapleyWrapper):
                known = classes == len(self._data.class_names)
                module = ShapleyWrapper(
                    module,
                    grid=model.grid,
                    image_size=self._config.data.image_size,
                    class_names=self._data.class_names if known else None,
                    **model.wrapper,
                )
        if model.kind == "plain" and isinstance(module, ShapleyWrapper):
            raise ConfigurationError(
                f"models.{model.name}: {model.model} makes a wrapped model; expected kind: wrapped."
            )
        if model.checkpoint is not None:
            load_weights(module, Path(model.checkpoint))
        return module

    def _load_start(
        self, model: ModelConfig, module: nn.Module, start: Mapping[str, torch.Tensor]
    ) -> None:
        try:
            module.load_state_dict(dict(start))
        except RuntimeError as error:
            raise ConfigurationError(
                f"models.{model.name} starts from {model.start!r}, whose weights are of another "
                f"model ({error}); expected the same model."
            ) from error

    def _bare(self, model: ModelConfig, classes: int) -> nn.Module:
        size = self._config.data.image_size
        if model.model in self._factories or ":" in model.model.removeprefix("torchvision:"):
            factory = self._factories.get(model.model) or load(model.model)
            offered = {"num_classes": classes, "image_size": size}
            taken = inspect.signature(factory).parameters
            module = factory(**{name: value for name, value in offered.items() if name in taken})
            if not isinstance(module, nn.Module):
                raise ConfigurationError(
                    f"models.{model.name}: {model.model} makes {type(module).__name__}; expected "
                    "an nn.Module."
                )
            if model.weights is not None:
                load_weights(module, Path(model.weights))
            return module
        if model.model == "efficientnet_lite0":
            return efficientnet_lite0(num_classes=classes)
        return build_by_name(
            model.model,
            num_classes=classes,
            image_size=size,
            weights=None if model.weights is None else Path(model.weights),
            pretrained=model.pretrained,
        )


def training_data(config: ComparisonConfig) -> dict[str, Any]:
    """The part of the data's settings that training depends on."""
    settings = asdict(config.data)
    return {
        name: settings[name]
        for name in settings
        if name not in ("eval_images", "accuracy_images", "workers")
    }


def normalization_of(model: ModelConfig, module: nn.Module) -> Normalization:
    """Statistics that were given, or that the model tells.

    Raises:
        ConfigurationError: Neither.
    """
    if model.mean is not None and model.std is not None:
        return Normalization(model.mean, model.std)
    explained = ExplainedModel(module)
    told = explained.normalization
    if told is None:
        try:
            told = explained.backbone.normalization()
        except ShapwrapError:
            told = None
    if told is None:
        raise ConfigurationError(
            f"models.{model.name}: {type(module).__name__} does not tell with which statistics "
            "its images are normalised; give mean and std."
        )
    return told


def model_digest(model: PreparedModel) -> str:
    """Short name of all that decides a model's weights."""
    return digest(model.made_from)
