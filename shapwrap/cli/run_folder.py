"""A training run on disk: how to build its model again, and its weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from shapwrap.backbones.base import Normalization
from shapwrap.data.by_name import build_by_name, load_weights
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
    return build_by_name(
        settings.name,
        num_classes=settings.num_classes,
        image_size=settings.image_size,
        weights=weights,
        pretrained=pretrained,
    )


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
