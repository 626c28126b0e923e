"""Names of all models that the libraries offer, and how to build one of them."""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from torch import nn

from shapwrap.errors import ArgumentError
from shapwrap.saving import open_clip_models

LIBRARIES = ("timm", "torchvision", "open_clip")


@dataclass(frozen=True, order=True)
class ModelName:
    """A model of a library."""

    library: str
    name: str

    def __str__(self) -> str:
        """As in a list of results, "timm:resnet50"."""
        return f"{self.library}:{self.name}"


def list_models(
    libraries: Sequence[str] = LIBRARIES, patterns: str | None = None
) -> list[ModelName]:
    """Models of the libraries whose names match one of several globs, comma separated.

    Raises:
        ArgumentError: An unknown library, or nothing matches.
        MissingDependencyError: open_clip is asked for and not installed.
    """
    found = []
    for library in libraries:
        if library not in LIBRARIES:
            raise ArgumentError(f"library is {library!r}; expected one of {LIBRARIES}.")
        found += [ModelName(library, name) for name in _names(library)]
    globs = [glob.strip() for glob in (patterns or "*").split(",")]
    chosen = [m for m in found if any(fnmatch.fnmatchcase(m.name, glob) for glob in globs)]
    if not chosen:
        raise ArgumentError(
            f"no model of {', '.join(libraries)} matches {patterns!r}; expected globs such as "
            "'resnet*', several of them comma separated."
        )
    return chosen


def _names(library: str) -> list[str]:
    if library == "timm":
        return timm.list_models()
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    return open_clip_models.imported().list_models()


def builder(model: ModelName) -> Callable[[], nn.Module]:
    """A function that builds the model with random weights; of open_clip the vision tower alone."""
    if model.library == "timm":
        return lambda: timm.create_model(model.name, pretrained=False)
    if model.library == "torchvision":
        return lambda: torchvision.models.get_model(model.name, weights=None)
    return lambda: _vision_tower(model.name)


def _vision_tower(name: str) -> nn.Module:
    config = open_clip_models.imported().get_model_config(name)
    quick_gelu = config.get("quick_gelu", False)
    return open_clip_models.vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu)


def input_size(model: ModelName, built: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that the model was made for."""
    if model.library == "torchvision":
        weights: Any = torchvision.models.get_model_weights(model.name)
        side = weights["DEFAULT"].transforms().crop_size[0]
        return 3, side, side
    if model.library == "open_clip":
        size: Any = built.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        return 3, height, width
    cfg: Any = built.pretrained_cfg
    return tuple(cfg["input_size"])


def defining_module(model: ModelName, built: nn.Module) -> str:
    """Source module, without its package: "resnet"."""
    if model.library == "timm":
        return timm.model_entrypoint(model.name).__module__.rsplit(".", 1)[-1]
    return type(built).__module__.rsplit(".", 1)[-1]


def class_name(built: nn.Module) -> str:
    """Class of the model; for a tower around another model, both."""
    trunk = trunk_of(built)
    inner = "" if trunk is built else f"({type(trunk).__name__})"
    return type(built).__name__ + inner


def trunk_of(built: nn.Module) -> nn.Module:
    """The network inside an adapter such as open_clip's TimmModel, else the model itself."""
    trunk = getattr(built, "trunk", None)
    return trunk if isinstance(trunk, nn.Module) and hasattr(trunk, "forward_features") else built


def has_classifier(model: ModelName, built: nn.Module) -> bool:
    """Whether the library gives the model class logits."""
    if model.library == "open_clip":
        return False
    return getattr(built, "num_classes", 1) != 0


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn about their own defaults while they build."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
