"""A model by its name, with weights from a file or from the library's hub."""

from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from shapwrap.errors import ArgumentError


def build_by_name(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A timm or torchvision classifier.

    A classifier of another number of classes is not loaded from the weights.

    Args:
        name: timm's name, or torchvision's after "torchvision:".
        num_classes: None keeps the model's own.
        image_size: Height and width, where the model is built for one.
        weights: A .safetensors or torch file.
        pretrained: Weights of the library's hub.

    Raises:
        ArgumentError: An unknown name, or weights that do not fit.
    """
    if weights is not None and pretrained:
        raise ArgumentError("--weights and --pretrained were both given; expected one of them.")
    _check_file(weights)
    if name.startswith("torchvision:"):
        return _build_torchvision(
            name.removeprefix("torchvision:"), num_classes, weights, pretrained
        )
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ArgumentError(
            f"{name!r} is no timm model; expected one of timm.list_models(), for example "
            f"{', '.join(close) or 'resnet50'}, or torchvision:NAME."
        )
    options: dict[str, Any] = {"pretrained": pretrained}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if weights is not None:
        options |= {
            "pretrained": True,
            "pretrained_cfg_overlay": {"file": str(weights), "custom_load": False},
        }
    try:
        if image_size is not None:
            try:
                return timm.create_model(name, img_size=image_size, **options)
            except TypeError:
                # Convolutional models have no img_size: they take any.
                pass
        return timm.create_model(name, **options)
    except RuntimeError as error:
        raise ArgumentError(f"{name} cannot be built so: {error}") from error


def _build_torchvision(
    name: str, num_classes: int | None, weights: Path | None, pretrained: bool
) -> nn.Module:
    if name not in torchvision.models.list_models(torchvision.models):
        raise ArgumentError(
            f"{name!r} is no torchvision classifier; see torchvision.models.list_models()."
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = torchvision.models.get_model(name, **options)
    if weights is not None:
        _load_fitting(model, read_state(weights), str(weights))
    elif pretrained:
        state = torchvision.models.get_model_weights(name)["DEFAULT"].get_state_dict()  # pyright: ignore[reportIndexIssue]
        _load_fitting(model, dict(state), f"torchvision's weights of {name}")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a .safetensors or torch file.

    Raises:
        ArgumentError: The file is missing or does not fit.
    """
    _load_state(model, read_state(path), str(path))


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU.

    Raises:
        ArgumentError: There is no such file.
    """
    _check_file(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


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


def _check_file(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise ArgumentError(f"{path} is no file; expected weights (.safetensors or .pth).")
