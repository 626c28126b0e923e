"""Constructor arguments as JSON, without anything that would have to be unpickled."""

import dataclasses
import importlib
import math
from functools import partial
from typing import Any

from torch import nn

from shapwrap.errors import ArgumentError, SavedModelError

LIBRARIES = ("torch", "timm", "torchvision", "open_clip")
"""Packages whose layers and configurations a folder may name. Other code needs consent."""


def encode(value: Any, path: str = "constructor") -> Any:
    """The value as JSON, with tags for what JSON does not have.

    Args:
        value: None, bool, int, finite float, str; lists, tuples, dicts with string keys and
            dataclasses of them; classes of layers, and `functools.partial` of such classes.
        path: Where it stands, for the error.

    Raises:
        ArgumentError: Something else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is list:
        return [encode(part, f"{path}[{number}]") for number, part in enumerate(value)]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"$tuple": [encode(part, f"{path}[{n}]") for n, part in enumerate(value)]}
    if isinstance(value, dict) and all(
        isinstance(key, str) and not key.startswith("$") for key in value
    ):
        return {key: encode(part, f"{path}[{key!r}]") for key, part in value.items()}
    if isinstance(value, type) and _describes(value):
        return {"$class": path_of(value)}
    if isinstance(value, partial) and isinstance(value.func, type) and _describes(value.func):
        given = {"arguments": encode(list(value.args), path)}
        return {
            "$partial": path_of(value.func),
            **given,
            "keywords": encode(value.keywords, path),
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"$dataclass": path_of(type(value)), "fields": encode(fields, path)}
    raise ArgumentError(
        f"{path} is {value!r:.80}, which JSON cannot hold; expected numbers, strings, lists, "
        "tuples and dicts of them, dataclasses, classes of layers, or functools.partial of such a "
        "class."
    )


def decode(value: Any, *, trust: bool) -> Any:
    """What `encode` was given.

    Args:
        value: As `encode` returned it.
        trust: Import classes from other packages than `LIBRARIES`, too.

    Raises:
        SavedModelError: An unknown tag, or a class that may not be named.
    """
    if isinstance(value, list):
        return [decode(part, trust=trust) for part in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: decode(part, trust=trust) for key, part in value.items()}
    if tag == "$tuple" and isinstance(value[tag], list):
        return tuple(decode(part, trust=trust) for part in value[tag])
    if tag == "$class":
        return class_at(value[tag], trust=trust)
    try:
        if tag == "$partial":
            arguments = decode(value["arguments"], trust=trust)
            keywords = decode(value["keywords"], trust=trust)
            return partial(class_at(value[tag], trust=trust), *arguments, **keywords)
        if tag == "$dataclass":
            fields = decode(value["fields"], trust=trust)
            return class_at(value[tag], trust=trust)(**fields)
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"an argument of kind {tag!r} is malformed: {error}") from error
    raise SavedModelError(
        f"an argument is of kind {tag!r}, which this version does not know; expected one of "
        "$tuple, $class, $partial, $dataclass."
    )


def path_of(cls: type) -> str:
    """Where a class is found again, "package.module:Class".

    Raises:
        ArgumentError: It is defined in a function or in the script that runs, so it is not.
    """
    path = f"{cls.__module__}:{cls.__qualname__}"
    found: Any = None
    if cls.__module__ != "__main__":
        try:
            found = importlib.import_module(cls.__module__)
            for name in cls.__qualname__.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            found = None
    if found is not cls:
        raise ArgumentError(
            f"{path} cannot be imported by this name; expected a class at the top of a module, "
            "not of the script that runs. Move it to a module of its own, or pass "
            "rebuild=False here and model= to from_pretrained."
        )
    return path


def class_at(path: object, *, trust: bool) -> type:
    """The class of that path: a layer or model (nn.Module), or a dataclass of its configuration.

    Raises:
        SavedModelError: No such class, or one that a folder may not name without consent.
    """
    if not isinstance(path, str) or path.count(":") != 1:
        raise SavedModelError(f"{path!r} names no class; expected 'package.module:Class'.")
    module, _, name = path.partition(":")
    if module.split(".")[0] not in LIBRARIES and not trust:
        raise SavedModelError(
            f"the saved model is built by {path}, which is code of none of "
            f"{', '.join(LIBRARIES)}. If you trust it, pass trust_remote_code=True, which imports "
            "it from your Python path; or build the backbone yourself and pass model=."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise SavedModelError(
            f"{path} cannot be imported ({error}); expected the package that defines it, in the "
            "version that the model was saved with. Or build the backbone yourself and pass model=."
        ) from error
    if not _describes(found):
        raise SavedModelError(f"{path} is no class of layers or of their configuration.")
    return found


def _describes(found: object) -> bool:
    layer = isinstance(found, type) and issubclass(found, nn.Module)
    return layer or (isinstance(found, type) and dataclasses.is_dataclass(found))
