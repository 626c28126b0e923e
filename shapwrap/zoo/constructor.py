"""A constructor's own arguments: recorded while a library builds a model, and changed."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Path = tuple[str | int, ...]
"""Where a value stands in the arguments: names, keys and indices."""


@dataclasses.dataclass(frozen=True)
class KeepFirst:
    """Shorten a list to its first items."""

    count: int


Replacement = float | tuple[int, ...] | KeepFirst
Changes = Mapping[Path, Replacement]
Arguments = dict[str, Any]


@contextmanager
def _intercepted(
    cls: type, intercept: Callable[[object, inspect.BoundArguments], None]
) -> Iterator[None]:
    """Call `intercept` with the arguments of every outermost constructor call of a class."""
    own = "__init__" in vars(cls)
    original = cls.__init__
    signature = inspect.signature(original)
    running: list[object] = []

    @functools.wraps(original)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        if running or type(self) is not cls:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        intercept(self, bound)
        running.append(self)
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            running.pop()

    setattr(cls, "__init__", init)  # noqa: B010
    try:
        yield
    finally:
        if own:
            setattr(cls, "__init__", original)  # noqa: B010
        else:
            del cls.__init__


def record_arguments(
    build: Callable[[], nn.Module], part: Callable[[nn.Module], nn.Module], cls: type
) -> Arguments:
    """Arguments by name, defaults included, with which `build` makes `part` of its model."""
    recorded: dict[int, Arguments] = {}
    alive = []

    def intercept(made: object, bound: inspect.BoundArguments) -> None:
        alive.append(made)
        recorded[id(made)] = _shallow(_flat(bound))

    with _intercepted(cls, intercept):
        model = build()
    return recorded.get(id(part(model)), {})


def _flat(bound: inspect.BoundArguments) -> Arguments:
    """Named arguments, with those of **kwargs among them."""
    flat: Arguments = {}
    for number, (name, value) in enumerate(bound.arguments.items()):
        kind = bound.signature.parameters[name].kind
        if number == 0 or kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        else:
            flat[name] = value
    return flat


def _shallow(value: Any) -> Any:
    """A copy of the containers: a constructor may empty those that it was given."""
    if isinstance(value, dict):
        return {key: _shallow(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_shallow, value))
    return value


@contextmanager
def changed_constructors(changes_of: Mapping[type, Changes]) -> Iterator[None]:
    """Inside, the outermost constructor call of each class gets changed arguments."""
    with ExitStack() as stack:
        for cls, changes in changes_of.items():
            stack.enter_context(_intercepted(cls, functools.partial(_change, changes)))
        yield


def _change(changes: Changes, made: object, bound: inspect.BoundArguments) -> None:
    # Items are changed before their list is shortened.
    for path, new in sorted(changes.items(), key=lambda item: isinstance(item[1], KeepFirst)):
        name = str(path[0])
        holder = bound.arguments
        for parameter in bound.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD and name not in holder:
                holder = holder.setdefault(parameter.name, {})
                break
        holder[name] = replaced(holder[name], path[1:], new)


def children(value: Any) -> list[tuple[str | int, Any]]:
    """Named or numbered parts of an argument: of lists, dicts and configuration objects."""
    if isinstance(value, Mapping):
        return [(key, item) for key, item in value.items() if isinstance(key, str)]
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    plain = not isinstance(value, type | nn.Module) and not callable(value)
    return list(vars(value).items()) if plain and hasattr(value, "__dict__") else []


def replaced(value: Any, path: Path, new: Replacement) -> Any:
    """A copy of an argument with one of its parts changed."""
    if not path:
        if isinstance(new, KeepFirst):
            return value[: new.count]
        return type(value)(new) if isinstance(new, tuple) and isinstance(value, list) else new
    key, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        return {**value, key: replaced(value[key], rest, new)}
    if isinstance(value, list | tuple) and isinstance(key, int):
        items = [replaced(v, rest, new) if i == key else v for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return items
    changed = replaced(getattr(value, str(key)), rest, new)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{str(key): changed})
    other = copy.copy(value)
    setattr(other, str(key), changed)
    return other
