"""What a model is made of, apart from the numbers in its weights: to tell two models apart."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Structure = dict[str, Any]
"""For each submodule its class, for each of its plain attributes the value, for each tensor the
shape."""

_SET_LATER = {"training", "grad_checkpointing", "fused_attn", "num_classes"}
"""What a user or a library changes on a model that is built, while its function stays the same; the
number of classes is told by the shapes, and stays behind when a classifier is replaced."""


def structure_of(model: nn.Module) -> Structure:
    """Classes, plain attributes and shapes of tensors, by name."""
    found: Structure = {}
    for name, module in model.named_modules():
        cls = type(module)
        found[f"class of {name or 'the model'}"] = f"{cls.__module__}.{cls.__qualname__}"
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute in _SET_LATER:
                continue
            if (plain := _plain(value)) is not None:
                found[f"{name}.{attribute}".lstrip(".")] = plain
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if count := len(getattr(module, hooks)):
                found[f"{hooks[1:]} of {name or 'the model'}"] = count
        if "forward" in vars(module):
            found[f"forward_replaced of {name or 'the model'}"] = True
    for name, tensor in model.state_dict().items():
        found[f"shape of {name}"] = tuple(tensor.shape)
    return found


def differences(target: Structure, built: Structure) -> list[str]:
    """What differs, in words; nothing where an attribute is only known of one of the two.

    A model may keep more attributes once it has run.
    """
    found = []
    for key in sorted(target.keys() | built.keys()):
        ours, theirs = target.get(key), built.get(key)
        if ours == theirs:
            continue
        essential = key.startswith(("class of ", "shape of ", "forward_"))
        if not essential and (key not in target or key not in built):
            continue
        found.append(f"{key} is {_said(ours)}, rebuilt it is {_said(theirs)}")
    return found


def without_data(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, on no device where its constructor allows that, else on the CPU.

    The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Libraries warn about their own defaults.
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):
            # A constructor that reads values of its tensors.
            return build()


def _plain(value: object) -> object:
    """A value that can be compared, None for all others; what is None itself says nothing."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if any(part is None for part in parts) else tuple(parts)
    if inspect.isfunction(value) or inspect.isbuiltin(value) or inspect.ismethod(value):
        return f"the function {value.__qualname__}"
    return None


def _said(value: object) -> str:
    return "absent" if value is None else f"{value!r:.60}".strip("'\"")
