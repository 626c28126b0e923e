"""Which parameters a run trains, and what becomes of the others while it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shapwrap.errors import TrainingError
from shapwrap.training.config import LoopConfig


def head_of(module: nn.Module, head: Iterable[nn.Parameter] | None = None) -> list[nn.Parameter]:
    """Parameters of the head, each once.

    Args:
        module: What is trained. A wrapped model tells by `head_parameters()`, a layer of its
            readout included; a head of several layers that was passed to it counts as a whole.
        head: The answer, where the caller knows it.
    """
    if head is not None:
        return list(head)
    told: Any = getattr(module, "head_parameters", None)
    found: list[nn.Parameter] = [] if told is None else list(told())
    passed = getattr(module, "new_head", None)
    if isinstance(passed, nn.Module):
        found += passed.parameters()
    return list({id(parameter): parameter for parameter in found}.values())


def kept_parameters(
    module: nn.Module, config: LoopConfig, head: Iterable[nn.Parameter]
) -> list[nn.Parameter]:
    """Parameters that could learn and, by `config.trainable`, do not.

    Raises:
        TrainingError: The head alone is to learn, and there is none that could.
    """
    if config.trainable == "all":
        return []
    learning = {id(parameter) for parameter in head if parameter.requires_grad}
    if not learning:
        raise TrainingError(
            f"trainable is 'head', but {type(module).__name__} tells of no head parameters that "
            "require a gradient; pass head=, unfreeze them, or use trainable='all'."
        )
    return [p for p in module.parameters() if p.requires_grad and id(p) not in learning]


def names_of(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Names of these parameters in the module, in its order."""
    wanted = {id(parameter) for parameter in parameters}
    return [name for name, parameter in module.named_parameters() if id(parameter) in wanted]


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters require no gradient inside; layers of no others then keep no graph."""
    switched = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in switched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


def resting_modules(module: nn.Module) -> list[nn.Module]:
    """Modules in which nothing requires a gradient: their noise would only blur what is fixed."""
    return [m for m in module.modules() if not any(p.requires_grad for p in m.parameters())]
