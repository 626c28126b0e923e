"""What a module of the model reads or returns while the model runs its own forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Recording:
    """Last inputs and outputs of recorded modules; later in-place changes show in them."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Any] = {}
        self.order: list[nn.Module] = []

    def note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """The forward hook."""
        if inputs and isinstance(inputs[0], Tensor):
            self.inputs[module] = inputs[0]
        self.outputs[module] = output
        self.order.append(module)


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[Recording]:
    """Records these modules inside; the hooks are gone afterwards."""
    record = Recording()
    handles = [module.register_forward_hook(record.note) for module in modules]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
