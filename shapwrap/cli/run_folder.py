"""A training run on disk: what it began with, and its saved model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shapwrap.backbones.base import Normalization
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.data.by_name import build_by_name
from shapwrap.errors import ArgumentError
from shapwrap.wrapper import ShapleyWrapper

SETTINGS = "shapwrap.json"


@dataclass(frozen=True)
class ModelSettings:
    """Everything that a run began with, but its weights."""

    name: str
    """timm's name, or torchvision's after "torchvision:"."""
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    class_names: list[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def normalization(self, wrapped: ShapleyWrapper | ShapleyCLIP) -> Normalization:
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


def save_settings(folder: Path, settings: ModelSettings) -> None:
    """Write what a run began with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def load_run(folder: Path) -> tuple[Normalization, ShapleyWrapper | ShapleyCLIP]:
    """How images are normalised, and the wrapped model, of a finished run or any saved model.

    Raises:
        SavedModelError: The folder does not hold a saved model, or it is damaged.
        ArgumentError: The settings of its run are damaged.
    """
    wrapped = ShapleyWrapper.from_pretrained(folder)
    settings = ModelSettings(name="")
    if (folder / SETTINGS).is_file():
        try:
            stored: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
            settings = ModelSettings(**stored)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{folder / SETTINGS} is damaged: {error}") from error
    return settings.normalization(wrapped), wrapped


def wrap_model(settings: ModelSettings, model: nn.Module) -> ShapleyWrapper:
    """The model, wrapped as the settings say."""
    return ShapleyWrapper(
        model,
        grid=settings.grid,
        image_size=settings.image_size,
        class_names=settings.class_names,
    )
