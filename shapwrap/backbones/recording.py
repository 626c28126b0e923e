"""What a module of the model reads or returns while the model runs its own forward pass."""

from collections.abc import Callable, Iterator, Sequence
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
def replaced_output(module: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module returns what `make` makes of its output inside."""

    def replace(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return make(output)

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Every parameter asks for gradients inside, frozen ones too, so that its influence shows."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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
