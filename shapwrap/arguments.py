"""Checks of what a user passes."""

from collections.abc import Sequence

from torch import nn

from shapwrap.errors import ArgumentError, BackboneTypeError


def check_arguments(
    model: object,
    features: object,
    head: object,
    grid: object,
    image_size: object,
    num_classes: int | None,
) -> None:
    """Raise unless the options of a wrapper are of the right kind.

    Raises:
        BackboneTypeError: A class, or no module.
        ArgumentError: A size that is not two positive ints, or no class.
    """
    if isinstance(model, type):
        raise BackboneTypeError(
            f"model is the class {model.__name__}; expected an instance. "
            f"Use ShapleyWrapper({model.__name__}(...))."
        )
    if not isinstance(model, nn.Module):
        raise BackboneTypeError(
            f"model is {type(model).__name__}; expected an nn.Module, for example "
            "timm.create_model(name, pretrained=True)."
        )
    if isinstance(head, type) or not (head is None or isinstance(head, str) or callable(head)):
        raise BackboneTypeError(
            f"head is {head!r}; expected nn.Linear, or nn.Sequential that ends in one. With "
            "features= it may also be the name of a submodule, or a function of pooled features."
        )
    if isinstance(features, type) or not (
        features is None or isinstance(features, str) or callable(features)
    ):
        raise BackboneTypeError(
            f"features is {features!r}; expected the name of a submodule, or a function of images."
        )
    for name, size in (("grid", grid), ("image_size", image_size)):
        valid = isinstance(size, Sequence) and len(size) == 2
        if size is not None and not (
            valid and all(isinstance(n, int) and n > 0 for n in size)  # pyright: ignore
        ):
            raise ArgumentError(f"{name} is {size!r}; expected two positive ints, rows first.")
    if num_classes is not None:
        check_at_least("num_classes", num_classes, 1)


def check_at_least(name: str, value: object, least: int) -> None:
    """Raise unless an option is an int and large enough.

    Raises:
        ArgumentError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name} is {value!r}; expected an int, at least {least}.")
