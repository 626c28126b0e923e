"""From a mapping, as YAML gives it, to a frozen dataclass; errors name the key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from shapwrap.errors import ConfigurationError

T = TypeVar("T")

Pair = tuple[int, int]
"""Rows and columns; one number stands for both."""

ROOT = "the configuration"
"""What errors call the whole."""


def from_mapping(kind: type[T], given: object, where: str) -> T:
    """An instance of a dataclass, whose annotations say what each key takes.

    Args:
        kind: The dataclass; a field without a default is a required key.
        given: What was written.
        where: Place in the configuration, for errors: "models[0]".

    Raises:
        ConfigurationError: An unknown or missing key, or a value of another kind.
    """
    values = mapping(given, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    check_keys(values, fields, where)
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigurationError(
            f"{where} has no {missing[0]!r}; expected the keys {', '.join(map(repr, missing))}."
        )
    hints = typing.get_type_hints(kind)
    prefix = "" if where == ROOT else f"{where}."
    return kind(
        **{name: convert(hints[name], value, prefix + name) for name, value in values.items()}
    )


def mapping(given: object, where: str) -> dict[str, Any]:
    """A mapping with names as keys; {} for an empty section.

    Raises:
        ConfigurationError: Anything else.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ConfigurationError(f"{where} is {given!r}; expected keys and values.")
    return dict(given)


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise on the first name that is not known.

    Raises:
        ConfigurationError: It names the unknown one, the nearest and all known ones.
    """
    names = list(known)
    for key in given:
        if key not in names:
            raise ConfigurationError(f"{where}: unknown key {key!r}; {suggestion(key, names)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest known name, where one is near, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}Known: {', '.join(names) or 'none'}."


def convert(annotation: Any, value: Any, where: str) -> Any:
    """A value as a field's annotation wants it.

    Raises:
        ConfigurationError: It cannot be read so.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        return _first_that_fits(kinds, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigurationError(f"{where} is {value!r}; {suggestion(str(value), arguments)}")
        return value
    if annotation == Pair:
        return _pair(value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where} is {value!r}; expected a list.")
        return tuple(convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        return mapping(value, where)
    if dataclasses.is_dataclass(annotation):
        return from_mapping(typing.cast(type, annotation), value, where)
    return _plain(annotation, value, where)


def _first_that_fits(kinds: list[Any], value: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except ConfigurationError as error:
            problems.append(error)
    raise problems[0]


def _pair(value: Any, where: str) -> Pair:
    numbers = (value, value) if isinstance(value, int) else value
    valid = isinstance(numbers, list | tuple) and len(numbers) == 2
    if not valid or not all(type(n) is int and n > 0 for n in numbers):
        raise ConfigurationError(
            f"{where} is {value!r}; expected one positive number, or [rows, columns]."
        )
    return numbers[0], numbers[1]


def _plain(kind: type, value: Any, where: str) -> Any:
    # YAML 1.1 reads 1e-3 as text; a person means the number.
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int:
        return float(value)
    if kind is not type(value):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigurationError(f"{where} is {value!r}; expected {names.get(kind, kind)}.")
    return value
