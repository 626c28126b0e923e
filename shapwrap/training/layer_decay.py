"""Learning rates that fall from layer to layer, from the head down to the patch embedding."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_scales(module: nn.Module, decay: float, head: Iterable[nn.Parameter]) -> dict[int, float]:
    """Factor of the learning rate by the id of each parameter; 1 for those that are left out.

    The layer below the head has `decay`, the one below that `decay` squared, and so on.

    Args:
        module: A model, or a module that holds one.
        decay: Factor from one layer to the one below it.
        head: Parameters above all layers.
    """
    above = {id(parameter) for parameter in head}
    layers = [
        [parameter for parameter in layer if id(parameter) not in above]
        for layer in layers_of(module)
    ]
    # A classifier that was replaced, or a head: nothing lies between what is below and the head.
    while layers and not any(parameter.requires_grad for parameter in layers[-1]):
        layers.pop()
    scales: dict[int, float] = {}
    for index, layer in enumerate(layers):
        for parameter in layer:
            scales.setdefault(id(parameter), decay ** (len(layers) - index))
    return scales


def layers_of(module: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each layer, from the images upwards; those of the output are left out.

    A timm model says by its own `group_matcher` what its layers are. In other models they are the
    outermost modules of a kind that comes more than once (blocks), and the single convolutions and
    linear layers around them, in the order in which the model registers them. Norms belong to the
    layer before. Parameters of no layer, as tokens and positions, belong to the first, but for
    projections of what the last norm returns.

    Args:
        module: A model, or a module that holds one; of an image-text model, its image tower.
    """
    return _Layers(module).found


class _Layers:
    def __init__(self, module: nn.Module):
        self.found: list[list[nn.Parameter]] = []
        self._kinds = Counter(type(m) for m in module.modules() if any(True for _ in m.children()))
        self._first: list[nn.Parameter] = []
        self._visit(_image_side(module))
        if self._first:
            self.found[:1] = [self._first + (self.found[0] if self.found else [])]

    def _visit(self, module: nn.Module) -> None:
        # Asked of the class: wrappers look attributes up on what they hold, whose names differ.
        if hasattr(type(module), "group_matcher"):
            self._ask(module)
            return
        children = list(module.children())
        if not children:
            self._leaf(module)
        elif type(module) not in CONTAINERS and self._kinds[type(module)] > 1:
            self.found.append(list(module.parameters()))
        else:
            for child in children:
                self._visit(child)
            self._first += [
                parameter
                for parameter in module.parameters(recurse=False)
                if not _is_projection(parameter, children)
            ]

    def _ask(self, model: Any) -> None:
        named = dict(model.named_parameters())
        found: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        numbers: dict[str, int] = found
        last = max(numbers.values(), default=0)
        # The highest group is that of the head, which has the full rate.
        layers: list[list[nn.Parameter]] = [[] for _ in range(last)]
        for name, number in numbers.items():
            if number < last:
                layers[number].append(named[name])
        self.found += layers

    def _leaf(self, layer: nn.Module) -> None:
        parameters = list(layer.parameters())
        if not parameters:
            return
        if self.found and all(parameter.ndim < 2 for parameter in parameters):
            self.found[-1] += parameters
        else:
            self.found.append(parameters)


def _image_side(module: nn.Module) -> nn.Module:
    """The image tower of an image-text model, which the layers of its texts are no part of."""
    for part in (module, getattr(module, "model", None)):
        tower = getattr(part, "visual", None)
        if isinstance(tower, nn.Module) and callable(getattr(part, "encode_text", None)):
            return tower
    return module


def _is_projection(parameter: nn.Parameter, children: list[nn.Module]) -> bool:
    """Whether a matrix takes what the last norm among the children returns."""
    norms = [c for c in children if [p.ndim for p in c.parameters()] in ([1], [1, 1])]
    if parameter.ndim != 2 or not norms:
        return False
    return parameter.shape[0] == next(norms[-1].parameters()).shape[0]
