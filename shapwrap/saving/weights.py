"""Weights of a wrapped model as they are stored: each tensor once, all or the changed ones."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shapwrap.errors import ArgumentError, SavedModelError, TrainingError
from shapwrap.saving.state_tree import pack

BACKBONE = "model."
"""What the names of the backbone's tensors begin with."""


class Collected(NamedTuple):
    """The state of a model."""

    tensors: dict[str, Tensor]
    """On the CPU, contiguous, no two in one storage."""
    tied: dict[str, str]
    """Names of tensors that are one with another one, and the name of that one."""

    def named(self, names: Collection[str], *, without: bool = False) -> dict[str, Tensor]:
        """Those among `names` (or those that are not), under all their names."""
        every = {**{name: name for name in self.tensors}, **self.tied}
        return {name: self.tensors[one] for name, one in every.items() if (one in names) != without}


def collect(wrapped: nn.Module) -> Collected:
    """Parameters and persistent buffers; tied ones once.

    Raises:
        SavedModelError: The state holds something else, or there are no values (meta device).
    """
    state = wrapped.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise SavedModelError(
            f"the state of the model holds {odd[0]}, which is no tensor; expected parameters and "
            "buffers alone. Leave get_extra_state out of the backbone."
        )
    if empty := [name for name, value in state.items() if value.is_meta]:
        raise SavedModelError(f"{empty[0]} is on the meta device; expected weights with values.")
    try:
        packed = pack(state)
    except TrainingError as error:
        raise SavedModelError(str(error)) from error
    names = {name: packed.tree[name]["$tensor"] for name in state}
    return Collected(packed.tensors, {name: one for name, one in names.items() if name != one})


def changed(
    wrapped: nn.Module, collected: Collected, base: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors that differ from those of a pretrained model.

    Without such a model those that training may have moved: parameters that require gradients, all
    buffers, and what is not of the backbone.

    Raises:
        ArgumentError: Nothing would be left out.
    """
    if base is None:
        parameters = wrapped.named_parameters(remove_duplicate=False)
        learning = {name for name, parameter in parameters if parameter.requires_grad}
        buffers = {name for name, _ in wrapped.named_buffers(remove_duplicate=False)}
        kept = {
            name: tensor
            for name, tensor in collected.tensors.items()
            if name in learning | buffers or not name.startswith(BACKBONE)
        }
    else:
        state = base.state_dict() if isinstance(base, nn.Module) else base
        kept = {}
        for name, tensor in collected.tensors.items():
            own = name.removeprefix(BACKBONE).replace(".base_layer.", ".")
            before = state.get(own) if name.startswith(BACKBONE) else None
            if before is None or not _same(before, tensor):
                kept[name] = tensor
    if len(kept) == len(collected.tensors):
        raise ArgumentError(
            "only_changed=True, but all weights may have changed: "
            + (
                "every parameter requires gradients. Pass base=, the pretrained model or its state "
                "dict, to compare with, or save everything."
                if base is None
                else "none is that of base. Expected the pretrained model that was fine-tuned, in "
                "the same precision; or save everything."
            )
        )
    return kept


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(memoryview(values))
    return found.hexdigest()


def check_fit(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], rest: int, model: str
) -> None:
    """Raise unless names and shapes are those of a model.

    Args:
        tensors: As stored.
        state: Of the model.
        rest: How many tensors of the model are not stored.
        model: Its class, for the error.

    Raises:
        SavedModelError: They are not.
    """
    unknown = sorted(tensors.keys() - state.keys())
    missing = sorted(state.keys() - tensors.keys())
    other = [name for name in tensors if name in state and tensors[name].shape != state[name].shape]
    faults = []
    if unknown:
        faults.append(f"{_some(unknown)} unknown to the model")
    if len(missing) != rest:
        faults.append(f"{_some(missing)} not in the file")
    if other:
        stored, built = tuple(tensors[other[0]].shape), tuple(state[other[0]].shape)
        faults.append(f"{other[0]} is {stored} in the file, {built} in the model")
    if faults:
        raise SavedModelError(
            f"the weights do not fit {model}: {'; '.join(faults)}. Expected the backbone that was "
            "saved; build it with the same arguments, or fetch the files anew."
        )


def align(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Bring the parameters and buffers of these names to the precision of the stored tensors."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        own = state.get(name)
        if own is not None and own.dtype != tensor.dtype:
            own.data = own.data.to(tensor.dtype)


def common_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The precision of all floating-point tensors; None where there are several."""
    found = {str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()}
    return found.pop().removeprefix("torch.") if len(found) == 1 else None


def _same(before: Tensor, tensor: Tensor) -> bool:
    before = before.detach().cpu()
    return before.dtype == tensor.dtype and torch.equal(before, tensor)


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
