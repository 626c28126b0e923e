"""Which layers make the last map of a backbone out of a finer one, seen while it runs."""

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.stride_one import LayerCall
from shapwrap.errors import GridError


class _Shrinking(NamedTuple):
    module: nn.Module
    before: Grid
    call: LayerCall | None
    """None for a module within which another one shrinks the map."""


def last_level(
    backbone: Backbone, images: Images, current: Grid, done: Collection[nn.Module]
) -> list[list[LayerCall]]:
    """Innermost layers that make a map of size `current` from a larger one, in two selections.

    The first holds the layer that runs last and those beside it, in the module that takes its
    finer map: the branches of a block. The second holds all. They differ where attention looks at
    a coarse copy of a finer map, which is not the way to the last map, and where a block reads
    the map of an earlier one, which is.

    Args:
        backbone: Of whose model the layers are.
        images: What to run it on.
        current: Size of its map.
        done: Layers that run at stride 1 already.

    Raises:
        GridError: No layer does, with the reason.
    """
    found: list[_Shrinking] = []
    channels_last: list[str] = []
    names = {module: name for name, module in backbone.model.named_modules()}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
        if layer in done or not (args and _is_map(args[0]) and _is_map(output)):
            return
        if sorted(args[0].shape) == sorted(output.shape):
            return  # A permutation of axes makes no other map.
        inside = set(layer.modules())
        before = _shrinks(args[0], output, axis=2, to=current)
        if before is not None:
            if any(other.module in inside for other in found):
                found.append(_Shrinking(layer, before, None))
                return
            # Later layers may work in place.
            given = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            call = LayerCall(names[layer], layer, given, kwargs, output.clone())
            found.append(_Shrinking(layer, before, call))
        elif _shrinks(args[0], output, axis=1, to=current) is not None:
            channels_last.append(f"{names[layer]} ({type(layer).__name__})")

    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in backbone.model.modules()
    ]
    try:
        backbone.features(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        where = channels_last[0] if channels_last else "code outside of any layer"
        raise GridError(f"its map is made by {where}, which has no stride to set to 1")
    return _selections(found)


def _selections(found: list[_Shrinking]) -> list[list[LayerCall]]:
    last = next(shrinking for shrinking in reversed(found) if shrinking.call is not None)
    block = set(last.module.modules())
    for shrinking in found:
        inside = set(shrinking.module.modules())
        if last.module in inside and shrinking.before == last.before:
            block |= inside
    every = [shrinking.call for shrinking in found if shrinking.call is not None]
    beside = [call for call in every if call.layer in block]
    return [beside, every] if len(beside) < len(every) else [every]


def _shrinks(given: Tensor, output: Tensor, *, axis: int, to: Grid) -> Grid | None:
    """Size of the map that was given, if `output` is a smaller one of size `to`."""
    before, after = given.shape[axis : axis + 2], output.shape[axis : axis + 2]
    if tuple(after) != to or before == after or before[0] < after[0] or before[1] < after[1]:
        return None
    return before[0], before[1]


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4
