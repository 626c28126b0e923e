"""A training run on disk: how to build its model again, and its weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.wrapper import ShapleyWrapper

SETTINGS = "shapwrap.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelSettings:
    """Everything that builds a wrapped model but its weights."""

    name: str
    """timm's name, or torchvision's after "torchvision:"."""
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    class_names: list[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def normalization(self, wrapped: ShapleyWrapper) -> Normalization:
        """Statistics of the run, else of the model, else 0.5: what most timm weights use."""
        if self.mean is not None and self.std is not None:
            return Normalization(tuple(self.mean), tuple(self.std))
        return wrapped.normalization or Normalization((0.5,) * 3, (0.5,) * 3)


def build_model(
    settings: ModelSettings, weights: Path | None = None, *, pretrained: bool = False
) -> nn.Module:
    """A model by name, with weights from a file or, `pretrained`, from the library's hub.

    A classifier of another number of classes is not loaded.

    Raises:
        ArgumentError: An unknown name, or weights that do not fit.
    """
    if weights is not None and pretrained:
        raise ArgumentError("--weights and --pretrained were both given; expected one of them.")
    _check_file(weights)
    if settings.name.startswith("torchvision:"):
        return _build_torchvision(settings, weights, pretrained)
    if not timm.is_model(settings.name):
        close = timm.list_models(f"*{settings.name.split('_')[0]}*")[:5]
        raise ArgumentError(
            f"{settings.name!r} is no timm model; expected one of timm.list_models(), for example "
            f"{', '.join(close) or 'resnet50'}, or torchvision:NAME."
        )
    options: dict[str, Any] = {"pretrained": pretrained}
    if settings.num_classes is not None:
        options["num_classes"] = settings.num_classes
    if weights is not None:
        options |= {
            "pretrained": True,
            "pretrained_cfg_overlay": {"file": str(weights), "custom_load": False},
        }
    try:
        if settings.image_size is not None:
            try:
                return timm.create_model(settings.name, img_size=settings.image_size, **options)
            except TypeError:
                # Convolutional models have no img_size: they take any.
                pass
        return timm.create_model(settings.name, **options)
    except RuntimeError as error:
        raise ArgumentError(f"{settings.name} cannot be built so: {error}") from error


def _build_torchvision(
    settings: ModelSettings, weights: Path | None, pretrained: bool
) -> nn.Module:
    name = settings.name.removeprefix("torchvision:")
    if name not in torchvision.models.list_models(torchvision.models):
        raise ArgumentError(
            f"{name!r} is no torchvision classifier; see torchvision.models.list_models()."
        )
    options = {} if settings.num_classes is None else {"num_classes": settings.num_classes}
    model = torchvision.models.get_model(name, **options)
    if weights is not None:
        _load_fitting(model, _read_state(weights), str(weights))
    elif pretrained:
        state = torchvision.models.get_model_weights(name)["DEFAULT"].get_state_dict()  # pyright: ignore[reportIndexIssue]
        _load_fitting(model, dict(state), f"torchvision's weights of {name}")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a .safetensors or torch file.

    Raises:
        ArgumentError: The file is missing or does not fit.
    """
    _load_state(model, _read_state(path), str(path))


def _load_fitting(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load all but a classifier of another number of classes, which stays as it was made."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = model.state_dict()
    for name in (f"{linear[-1]}.weight", f"{linear[-1]}.bias") if linear else ():
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
    _load_state(model, state, source)


def _load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError(f"{source} does not fit {type(model).__name__}: {error}") from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    _check_file(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_file(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise ArgumentError(f"{path} is no file; expected weights (.safetensors or .pth).")


def save_run(folder: Path, settings: ModelSettings, wrapped: ShapleyWrapper | None = None) -> None:
    """Write the settings and, where a model is given, its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")
    if wrapped is not None:
        state = {name: tensor.contiguous() for name, tensor in wrapped.state_dict().items()}
        save_file(state, folder / WEIGHTS)


def load_run(folder: Path) -> tuple[ModelSettings, ShapleyWrapper]:
    """Settings and wrapped model of a finished run.

    Raises:
        ArgumentError: The folder does not hold a finished run.
    """
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ArgumentError(
                f"{folder} has no {name}; expected the --out folder of a finished 'shapwrap train'."
            )
    try:
        stored: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    except ValueError as error:
        raise ArgumentError(f"{folder / SETTINGS} is damaged: {error}") from error
    for name in ("image_size", "grid", "mean", "std"):
        stored[name] = None if stored[name] is None else tuple(stored[name])
    settings = ModelSettings(**stored)
    wrapped = wrap_model(settings, build_model(settings))
    load_weights(wrapped, folder / WEIGHTS)
    return settings, wrapped.eval()


def wrap_model(settings: ModelSettings, model: nn.Module) -> ShapleyWrapper:
    """The model, wrapped as the settings say."""
    return ShapleyWrapper(
        model,
        grid=settings.grid,
        image_size=settings.image_size,
        class_names=settings.class_names,
    )
