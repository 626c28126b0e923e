"""Which layers run when a function is called."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RanLayer(NamedTuple):
    """A leaf layer that ran, and where to find it."""

    owner: nn.Module
    name: str
    changed_input: bool

    def module(self) -> nn.Module:
        """The layer, looked up anew so that a replaced one is found."""
        return self.owner.get_submodule(self.name)


def layers_that_run(call: Callable[[], Any], owners: Sequence[nn.Module]) -> list[RanLayer]:
    """Leaf layers of `owners` in the order in which `call` runs them.

    Hooks are registered for this one call and removed.
    """
    ran: list[RanLayer] = []
    handles = []
    for owner in owners:
        for name, module in owner.named_modules():
            if not list(module.children()):

                def record(
                    layer: nn.Module,
                    inputs: tuple[Tensor, ...],
                    output: Tensor,
                    owner: nn.Module = owner,
                    name: str = name,
                ) -> None:
                    same = torch.equal(inputs[0].flatten(1), output.flatten(1))
                    ran.append(RanLayer(owner, name, changed_input=not same))

                handles.append(module.register_forward_hook(record))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return ran
