"""Low-rank adapters of a wrapped model that are not merged: put aside, described, put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import SavedModelError
from shapwrap.wrapper import ShapleyWrapper


def describe_adapters(model: nn.Module) -> dict[str, Any] | None:
    """Rank, alpha, dropout and layers of the adapters of `add_lora`; None if there are none.

    Raises:
        SavedModelError: Adapters of another kind.
    """
    configurations = getattr(model, "peft_config", None)
    if not configurations:
        return None
    from shapwrap.training.lora import adapted_layers, configuration_of

    names = [name for name, _ in adapted_layers(model)]
    # peft's configurations are dataclasses, one for each adapter of a model.
    said: Any = next(iter(configurations.values()))
    found = {"rank": said.r, "alpha": said.lora_alpha, "dropout": said.lora_dropout}
    ours = configuration_of(names, **found).to_dict() if hasattr(said, "r") else {}
    theirs = said.to_dict()
    where = {"target_modules"}
    other = [key for key in theirs if key not in where and theirs[key] != ours.get(key)]
    if len(configurations) != 1 or other:
        raise SavedModelError(
            f"{type(model).__name__} has adapters of {type(said).__name__} with "
            f"{', '.join(other[:3]) or 'several names'} of their own; expected those of add_lora. "
            "Merge them with merge_lora() first."
        )
    return {**found, "layers": names}


def insert_adapters(wrapped: ShapleyWrapper | ShapleyCLIP, said: dict[str, Any]) -> None:
    """Give a wrapped model such adapters, whose weights are still to be loaded.

    Raises:
        SavedModelError: The model has no such layers.
        MissingDependencyError: peft is not installed.
    """
    from shapwrap.training.lora import put_adapters

    tower = wrapped.tower if isinstance(wrapped, ShapleyCLIP) else wrapped
    names = said["layers"]
    own = {name for name, _ in tower.model.named_modules()}
    if not isinstance(names, list) or not names or not set(names) <= own:
        raise SavedModelError(
            f"the adapters are of layers {names!r:.80}, which {type(tower.model).__name__} does "
            "not have; expected the backbone that was saved."
        )
    put_adapters(tower, names, rank=said["rank"], alpha=said["alpha"], dropout=said["dropout"])


@contextmanager
def adapters_aside(model: nn.Module) -> Iterator[None]:
    """The plain layers stand in their places inside."""
    if not getattr(model, "peft_config", None):
        yield
        return
    from shapwrap.training.lora import adapted_layers

    layers = adapted_layers(model)
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)
