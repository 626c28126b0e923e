"""Compared methods: which model each explains, and how one is made."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.comparison.config import ComparisonConfig, MethodConfig, ModelConfig
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.models import PreparedModel, model_digest, training_data
from shapwrap.comparison.registry import METHODS, find_method, load
from shapwrap.comparison.schema import check_keys, convert, mapping
from shapwrap.comparison.store import Piece, Store
from shapwrap.errors import ConfigurationError, ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explanation import Explanation

Method = Callable[..., Explanation]
"""Normalised images and classes to an explanation."""

GIVEN = ("model", "chunk_size", "generator", "config")
"""Arguments of a method's class that the comparison fills in."""


def applies(method: MethodConfig, model: ModelConfig) -> bool:
    """Whether the configuration asks for this method on this model."""
    if method.models == "all":
        known = METHODS.get(method.method)
        return known is None or known.models in ("all", model.kind)
    if method.models in ("plain", "wrapped"):
        return method.models == model.kind
    names = (method.models,) if isinstance(method.models, str) else method.models
    return model.name in names or model.kind in names or "all" in names


def class_of(method: MethodConfig, own: Mapping[str, Any]) -> Any:
    """The class of a method: one's own by that name, a known one, or "module:class".

    Raises:
        ConfigurationError: There is none, or it takes no such options.
    """
    found = own.get(method.method)
    if found is None:
        found = load(find_method(method.method).path)
    where = f"methods.{method.name}"
    check_keys(method.options, _option_names(found), f"{where}.options")
    if method.training:
        if not learns(found):
            raise ConfigurationError(
                f"{where}.training is given, and {method.method} learns nothing; remove it."
            )
        trained_config(found, method, seed=0, folder=None, progress=None)
    return found


def learns(kind: Any) -> bool:
    """Whether a method has to be trained: it has fit, state_dict and load_state_dict."""
    return all(
        callable(getattr(kind, name, None)) for name in ("fit", "state_dict", "load_state_dict")
    )


def make_method(
    kind: Any,
    method: MethodConfig,
    model: PreparedModel,
    run: ComparisonConfig,
    data: ComparisonData,
    store: Store,
    progress: bool | None,
) -> Method:
    """The method, bound to the model; trained, or loaded, where it learns.

    Raises:
        UnsupportedBackboneError: The method does not apply to this model.
        ShapwrapError: Options that it refuses, or training that fails.
    """
    parameters = inspect.signature(kind).parameters
    taken: dict[str, Any] = dict(method.options)
    offered: dict[str, Any] = {
        "chunk_size": run.chunk_size,
        "generator": torch.Generator().manual_seed(run.seed),
    }
    if model.config.grid is not None and model.wrapped is None and _takes_any_grid(kind, model):
        offered["grid"] = model.config.grid
    taken = {name: value for name, value in offered.items() if name in parameters} | taken
    if isinstance(taken.get("grid"), list | int):
        taken["grid"] = convert(tuple[int, int], taken["grid"], f"methods.{method.name}.grid")
    if not learns(kind):
        return kind(model.module, **taken)
    made_from = {
        "method": dataclasses.asdict(method) | {"models": None},
        "model": model_digest(model),
        "data": training_data(run),
        "grid": taken.get("grid"),
        "seed": run.seed,
    }
    key = ("explainers", model.name, method.name)
    piece = store.read(*key, made_from=made_from)
    if piece is not None:
        config = trained_config(kind, method, seed=run.seed, folder=None, progress=progress)
        return kind(model.module, config=config, **taken).load_state_dict(store.tensors(*key))
    folder, begun = store.working_folder(*key, made_from=made_from)
    config = trained_config(kind, method, seed=run.seed, folder=folder, progress=progress)
    made = kind(model.module, config=config, **taken)
    size = method.training.get("batch_size", 32)
    batches = data.training_batches(model.normalization, size)
    made.fit(batches, resume=begun)
    store.write(
        *key,
        piece=Piece("finished", made_from, {"history": _last_records(made)}),
        tensors=made.state_dict(),
    )
    store.discard_working_folder(*key)
    return made


def trained_config(
    kind: Any, method: MethodConfig, *, seed: int, folder: Any, progress: bool | None
) -> Any:
    """The configuration object of a method that learns, with `training` put in.

    Settings of a stage (a nested configuration) are given as a mapping; seed, folder and progress
    bar of a stage are the comparison's.

    Raises:
        ConfigurationError: An unknown setting.
    """
    where = f"methods.{method.name}.training"
    values = {name: value for name, value in method.training.items() if name != "batch_size"}
    size = method.training.get("batch_size", 32)
    if type(size) is not int or size < 1:
        raise ConfigurationError(f"{where}.batch_size is {size!r}; expected at least 1.")
    wanted = typing.get_type_hints(kind).get("config")
    if not dataclasses.is_dataclass(wanted):
        return values | {"seed": seed}
    base = typing.cast(type, wanted)()
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    check_keys(values, ["batch_size", *fields], where)
    ours = {"seed": seed, "progress": progress}
    for name, default in fields.items():
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            if name in values and values[name] is None:
                continue
            given = mapping(values.get(name), f"{where}.{name}")
            hints = typing.get_type_hints(type(default))
            check_keys(given, hints, f"{where}.{name}")
            stage = {k: convert(hints[k], v, f"{where}.{name}.{k}") for k, v in given.items()}
            known = {key: value for key, value in ours.items() if key in hints}
            if folder is not None and "output_dir" in hints:
                known["output_dir"] = folder / name
            values[name] = dataclasses.replace(default, **stage, **known)
        elif name in values:
            hint = typing.get_type_hints(type(base))[name]
            values[name] = convert(hint, values[name], f"{where}.{name}")
    return dataclasses.replace(base, **values)


def _takes_any_grid(kind: Any, model: PreparedModel) -> bool:
    """Whether values can be given for other patches than the model's own tokens."""
    if getattr(kind, "any_grid", True):
        return True
    try:
        return not isinstance(ExplainedModel(model.module).backbone, TokenBackbone)
    except ShapwrapError:
        return True


def _option_names(kind: Any) -> list[str]:
    """What `options` of a method may say."""
    return [name for name in inspect.signature(kind).parameters if name not in GIVEN]


def _last_records(made: Any) -> dict[str, Any]:
    history = getattr(made, "history", {})
    return {stage: records[-1] for stage, records in history.items() if records}
