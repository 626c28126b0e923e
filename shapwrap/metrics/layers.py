"""The layers of a model in the order in which it reads their parameters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import ExplainedModel

Layers = dict[str, list[nn.Parameter]]
"""Parameters by the name of the module that owns them."""


def layers_by_name(model: nn.Module, names: Sequence[str]) -> Layers:
    """Modules, each with all that it contains, in the order given.

    Raises:
        ArgumentError: A name that the model lacks, or nothing to randomise.
    """
    if isinstance(names, str):
        raise ArgumentError(f"layers is {names!r}; expected a list of names: layers=[{names!r}].")
    if not names:
        raise ArgumentError("layers is empty; expected names of model.named_modules(), or None.")
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ArgumentError(
            f"layers hold {unknown[:3]}, which the model lacks; expected names of "
            "model.named_modules()."
        )
    layers = {name: list(modules[name].parameters()) for name in names}
    return _not_empty({name: parameters for name, parameters in layers.items() if parameters})


def layers_from_output(
    model: nn.Module, images: Tensor, read_elsewhere: Sequence[nn.Parameter] = ()
) -> Layers:
    """Every layer that owns parameters which a forward pass reads, the last one read first.

    What counts is which tensors operations receive, so it makes no difference whether a module is
    called or its weights are used by hand. Parameters that nothing reads are left out.

    Args:
        model: Runs once, in eval mode.
        images: Float [B, C, H, W]; the first one is used.
        read_elsewhere: Further parameters, in the order of reading: what only the explanation
            uses stands before the output.

    Raises:
        ArgumentError: The model reads no parameters.
    """
    explained = ExplainedModel(model)
    quietly = torch.random.fork_rng(devices=[])
    with explained.evaluated(), torch.no_grad(), quietly, parameters_read(model) as read:
        explained.logits(images[:1])
    order = list(read)
    known = set(map(id, order))
    order += [parameter for parameter in read_elsewhere if id(parameter) not in known]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: Layers = {}
    for parameter in order:
        layers.setdefault(names[id(parameter)].rpartition(".")[0], []).append(parameter)
    return _not_empty(dict(reversed(layers.items())))


@contextmanager
def parameters_read(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that operations receive inside, each once, in the order of first use."""
    reads = _Reads(model)
    with reads:
        yield reads.order


class _Reads(TorchDispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.order: list[nn.Parameter] = []
        self._unread = {id(parameter): parameter for parameter in model.parameters()}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and note the parameters among its arguments."""
        options = dict(kwargs or {})
        for argument in tree_leaves((args, options)):
            parameter = self._unread.pop(id(argument), None)
            if parameter is not None:
                self.order.append(parameter)
        return func(*args, **options)


def _not_empty(layers: Layers) -> Layers:
    if not layers:
        raise ArgumentError("these layers have no parameters; expected some to randomise.")
    return layers
