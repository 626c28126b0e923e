"""The layers of a model in the order in which it runs them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shapwrap.errors import ArgumentError
from shapwrap.explainers.explained_model import ExplainedModel


def layers_from_output(
    model: nn.Module, images: Tensor, names: Sequence[str] | None = None
) -> dict[str, list[nn.Parameter]]:
    """Parameters by layer, from the output to the input.

    Args:
        model: Runs once, in eval mode.
        images: Float [B, C, H, W]; the first one is used.
        names: Modules, each with all that it contains, in this order; by default every module that
            runs and has parameters of its own. Parameters of a module that is never called belong
            to the module around it.

    Raises:
        ArgumentError: A name that the model lacks, or nothing to randomise.
    """
    modules = dict(model.named_modules())
    if names is not None:
        unknown = [name for name in names if name not in modules]
        if unknown or not names:
            raise ArgumentError(
                f"layers hold {unknown[:3]}, which the model lacks; expected names of "
                "model.named_modules()."
            )
        groups = {name: list(modules[name].parameters()) for name in names}
    else:
        groups = _by_execution(model, modules, images)
    groups = {name: parameters for name, parameters in groups.items() if parameters}
    if not groups:
        raise ArgumentError("these layers have no parameters; expected some to randomise.")
    return groups


def _by_execution(
    model: nn.Module, modules: dict[str, nn.Module], images: Tensor
) -> dict[str, list[nn.Parameter]]:
    place = _places(model, modules, images[:1])
    owned: dict[str, list[nn.Parameter]] = {name: [] for name in place}
    seen: set[int] = set()
    for name, module in modules.items():
        around = name
        while around not in place:
            around = around.rpartition(".")[0]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                owned[around].append(parameter)
    return dict(reversed(owned.items()))


def _places(model: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> list[str]:
    """Names of the modules that are called, in the order of their first call.

    The model comes first: its own parameters, position embeddings and class tokens, act first.
    """
    names = {module: name for name, module in modules.items()}
    place = [""]

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if names[module] not in place:
            place.append(names[module])

    handles = [module.register_forward_pre_hook(note) for module in modules.values()]
    explained = ExplainedModel(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), explained.evaluated():
            explained.logits(images)
    finally:
        for handle in handles:
            handle.remove()
    return place
