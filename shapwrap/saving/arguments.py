"""Constructor arguments of a model that is built already, read off the model and then proved."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from shapwrap.errors import ArgumentError, SavedModelError
from shapwrap.saving.structure import Structure, differences, structure_of, without_data
from shapwrap.saving.values import encode

Arguments = dict[str, Any]


def find_arguments(
    build: Callable[..., nn.Module],
    model: nn.Module,
    given: Mapping[str, Any],
    *,
    further: bool = False,
    alike: bool = False,
) -> Arguments:
    """Arguments with which `build` makes the structure of `model`.

    What the model keeps as an attribute under the name of the argument is tried, together and then
    one by one, wherever the model differs from one that is built without.

    Args:
        build: Takes arguments by name.
        model: Built already.
        given: Arguments that are known.
        further: `build` takes more arguments than the class of the model names.
        alike: Give up at once if other tensors exist without any argument, where many builders
            are tried.

    Raises:
        SavedModelError: None were found; with what differs.
    """
    target, chosen = structure_of(model), dict(given)
    wrong = _differences(build, chosen, target)
    if not wrong:
        return chosen
    if alike and any(_other_tensors(difference) for difference in wrong):
        raise not_rebuilt(model, chosen, wrong)
    usual = _told_without(build, given, further)
    remaining = {
        name: value
        for name, value in candidates(model, further).items()
        if name not in given and (name not in usual or usual[name] != value)
    }
    together = {**chosen, **remaining}
    if not _differences(build, together, target):
        return together
    while remaining:
        trials = {
            name: _differences(build, {**chosen, name: value}, target)
            for name, value in remaining.items()
        }
        best = min(trials, key=lambda name: len(trials[name]))
        if len(trials[best]) >= len(wrong):
            break
        wrong = trials[best]
        chosen[best] = remaining.pop(best)
        if not wrong:
            return chosen
    raise not_rebuilt(model, chosen, wrong)


def candidates(model: nn.Module, further: bool) -> Arguments:
    """What a model tells of the arguments it was built with."""
    found: Arguments = {}
    names = _parameters(type(model))
    for name in names:
        value = getattr(model, name, None)
        if name == "bias" and hasattr(model, name) and not isinstance(value, bool):
            value = value is not None
        if value is not None and _storable(value):
            found[name] = value
    parts = _of_parts(model).items()
    return found | {name: value for name, value in parts if further or name in names}


def not_rebuilt(
    model: nn.Module, arguments: Mapping[str, Any], wrong: list[str]
) -> SavedModelError:
    """The error for a backbone that its description does not rebuild."""
    return SavedModelError(
        f"built with {dict(arguments)!r:.200}, {type(model).__name__} is another model: "
        f"{'; '.join(wrong[:3])}{f' ({len(wrong)} differences in all)' if len(wrong) > 3 else ''}. "
        "Pass the arguments that it was built with, constructor={...}; or rebuild=False, and "
        "model= (built as you built this one) to from_pretrained."
    )


def _other_tensors(difference: str) -> bool:
    absent = " is absent, " in difference or difference.endswith("it is absent")
    return difference.startswith("its constructor") or (
        absent and difference.startswith("shape of ")
    )


def _told_without(
    build: Callable[..., nn.Module], given: Mapping[str, Any], further: bool
) -> Arguments:
    """What a model tells that is built with the given arguments alone, where it can be."""
    try:
        return candidates(without_data(lambda: build(**given)), further)
    except Exception:  # a constructor of any library raises what it likes
        return {}


def _differences(
    build: Callable[..., nn.Module], arguments: Mapping[str, Any], target: Structure
) -> list[str]:
    try:
        built = without_data(lambda: build(**arguments))
    except Exception as error:  # a constructor of any library raises what it likes
        # More than any model that was built.
        return [f"its constructor raises {type(error).__name__}: {error}"] * (len(target) + 1)
    return differences(target, structure_of(built))


def _parameters(cls: type) -> list[str]:
    """Names of a constructor's arguments, those of its bases too where it passes them on."""
    names: list[str] = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        names += [p.name for p in parameters if p.kind in named and p.name not in names]
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def _of_parts(model: nn.Module) -> Arguments:
    """Arguments that usual models keep in a part of theirs, under the names of timm."""
    found: Arguments = {}
    part: Any
    for part in model.modules():
        if (size := getattr(part, "img_size", None)) is not None and _storable(size):
            found.setdefault("img_size", size)
        pooling = getattr(part, "pool_type", None)
        if isinstance(pooling, str):
            found["global_pool"] = pooling
        if type(part).__name__ == "DropPath":
            # Spread over the blocks in float32.
            rate = round(float(getattr(part, "drop_prob", 0.0) or 0.0), 7)
            found["drop_path_rate"] = max(rate, found.get("drop_path_rate", 0.0))
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    if first is not None:
        found["in_chans"] = first.in_channels
    if (num_classes := _num_classes(model)) is not None:
        found["num_classes"] = num_classes
    return found


def _num_classes(model: nn.Module) -> int | None:
    """As the model says, unless its classifier was replaced since."""
    stated = getattr(model, "num_classes", None)
    linear = [part.out_features for part in model.modules() if isinstance(part, nn.Linear)]
    convolutions = [p.out_channels for p in model.modules() if isinstance(p, nn.Conv2d)]
    if isinstance(stated, int) and stated in (0, *linear, *convolutions):
        return stated
    return linear[-1] if linear else None


def _storable(value: object) -> bool:
    try:
        encode(value)
    except ArgumentError:
        return False
    return not isinstance(value, type)
