"""Nested state as JSON and tensors: what is saved in place of pickled objects."""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shapwrap.errors import TrainingError


class Packed(NamedTuple):
    """State in two parts: the tree can be written as JSON, the tensors as safetensors."""

    tree: Any
    tensors: dict[str, Tensor]
    """On the CPU, contiguous, no two in one storage."""


def pack(state: Any, prefix: str = "", *, keep: bool = True) -> Packed:
    """The state, taken apart.

    Tensors that are one and the same (tied weights) are stored once. Those that are split among
    processes are put together, which needs a call in all of them, in the same order.

    Args:
        state: None, bool, int, float, str, tensors, numpy arrays; lists, tuples and dicts of them.
        prefix: Of the tensors' names, which say where in the state they were.
        keep: Collect the tensors; without it the call only takes part in putting them together.

    Raises:
        TrainingError: Something else.
    """
    packer = _Packer(keep)
    tree = packer.pack(state, prefix)
    return Packed(tree, packer.tensors)


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The state; tensors are those given, not copies.

    Raises:
        KeyError: A tensor is missing.
        ValueError: This was not made by `pack`.
    """
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next((key for key in tree if key.startswith("$")), None)
    if tag is None:
        return {key: unpack(value, tensors) for key, value in tree.items()}
    value = tree[tag]
    if tag == "$tensor":
        return tensors[value]
    if tag == "$tuple":
        return tuple(unpack(part, tensors) for part in value)
    if tag == "$items":
        return {key: unpack(part, tensors) for key, part in value}
    if tag == "$float":
        return float(value)
    if tag == "$array":
        kind = np.dtype(str(tree["dtype"]))
        return tensors[value].numpy().view(kind).reshape(tree["shape"])
    raise ValueError(f"{tag!r} is no kind of value")


class _Packer:
    def __init__(self, keep: bool):
        self.tensors: dict[str, Tensor] = {}
        self._keep = keep
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def pack(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value, path)}
        if isinstance(value, np.generic):
            return self.pack(value.item(), path)
        if kind is np.ndarray and value.dtype.kind in "biuf":
            raw = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            name = self._tensor(raw, path)
            return {"$array": name, "dtype": value.dtype.str, "shape": list(value.shape)}
        if kind in (list, tuple):
            parts = [self.pack(part, f"{path}/{number}") for number, part in enumerate(value)]
            return parts if kind is list else {"$tuple": parts}
        if kind in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
            below = f"{path}/" if path else ""
            parts = {key: self.pack(part, f"{below}{key}") for key, part in value.items()}
            plain = all(isinstance(key, str) and not key.startswith("$") for key in parts)
            return parts if plain else {"$items": [list(item) for item in parts.items()]}
        raise TrainingError(
            f"the state to save holds {kind.__module__}.{kind.__qualname__} at {path!r}; expected "
            "numbers, strings, tensors, numpy arrays, and lists, tuples and dicts of them. "
            "Checkpoints hold nothing that would have to be unpickled."
        )

    def _tensor(self, tensor: Tensor, path: str) -> str:
        # What is split among processes (FSDP) is a DTensor.
        split: Any = getattr(tensor, "full_tensor", None)
        tensor = (tensor if split is None else split()).detach()
        if not self._keep:
            return ""
        if tensor.layout != torch.strided:
            raise TrainingError(
                f"the state to save holds a tensor of layout {tensor.layout} at {path!r}; expected "
                "a dense one."
            )
        same = _identity(tensor)
        # A tensor that was just put together is gone afterwards, and its address is used again.
        if split is None and tensor.numel() and same in self._names:
            return self._names[same]
        name = path
        while name in self.tensors:
            name += "'"
        self.tensors[name] = self._on_host(tensor)
        if split is None:
            self._names[same] = name
        return name

    def _on_host(self, tensor: Tensor) -> Tensor:
        host = tensor.to("cpu").contiguous()
        storage = host.untyped_storage()
        if storage.nbytes() != host.nbytes or storage.data_ptr() in self._storages:
            host = host.clone()
        self._storages.add(host.untyped_storage().data_ptr())
        return host


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (tensor.device, *place, tensor.shape, tensor.stride(), tensor.dtype)
