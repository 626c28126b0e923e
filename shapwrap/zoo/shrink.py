"""Smaller instances of a class, through the arguments of its own constructor.

What an argument means is read off its name and kind: blocks and layers are counted by depth,
channels by width. Every change is tried on a model without data, and dropped where the class
cannot be built so.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from shapwrap.zoo.constructor import Arguments, Changes, KeepFirst, Path, Replacement, children
from shapwrap.zoo.cost import Cost, Probe

DEPTH = re.compile(
    r"(^|_)(depths?|layers|repeats|levels|serial_depths|block_config|block_per_stage|stages|blocks"
    r"|num_modules)(_|$)|^d$|^k_sec$"
)
NOT_DEPTH = re.compile(r"index|att|type|class|token|cls|rate|drop|_up_to_|global|scale|vit_stem")
WIDTH = re.compile(
    r"(^|_)(dims?|chs|chans|channels|width|widths|planes|filters|features|sizes|group_size|c|w0|wa)(_|$)|^cfg$"
)
NOT_WIDTH = re.compile(
    r"(^|_)(in|head_dim|dim_head|key|patch|kernel|window|img|image|pos|mul|mult|factor|base_width"
    r"|state|head_width|div|grid|per_group)(_|$)"
)
BOUNDARY = re.compile(r"_up_to_layer$")
"""Where blocks of another kind begin: of both kinds some must be left."""
HEADS = re.compile(r"(^|_)heads(_|$)")
IMAGE = ("img_size", "image_size", "input_size")

SMALLEST_WIDTH = 8
GRIDS = (4, 6, 7, 8)
"""Patches a side of a smaller image: each, until the model takes it."""
DEPTHS = (2, 1)
MORE_DEPTHS = (4, 8)
"""For classes that share one number of blocks out among their stages."""
DIVISORS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """How to build an instance that is cheap enough."""

    image_size: tuple[int, int]
    cost: Cost
    changes_of: Mapping[type, Changes] = field(default_factory=dict)
    in_words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was changed, "" for nothing."""
        return ", ".join(self.in_words)


@dataclass(frozen=True)
class Limits:
    """What is cheap enough to be checked as it is."""

    parameters: float = 12e6
    work: float = 0.25e9


def shrink(
    probe: Probe,
    full: Plan,
    arguments_of: Mapping[type, Arguments],
    reduction: int,
    limits: Limits,
) -> Plan:
    """The first plan within the limits, else the cheapest.

    A smaller image comes first, then fewer blocks, then fewer channels.
    """
    plan = full

    def enough() -> bool:
        return plan.cost.within(limits.parameters, limits.work)

    # A smaller image alone saves a factor of about three; where more is needed, models of few
    # blocks are tried sooner.
    image_first = full.cost.within(limits.parameters, 4 * limits.work)
    if not enough() and image_first:
        plan = _smaller_image(probe, plan, arguments_of, reduction)
    for depth in (*DEPTHS, *MORE_DEPTHS):
        if not enough() and not (depth in MORE_DEPTHS and plan.in_words):
            change = _per_class(arguments_of, lambda a, d=depth: depth_changes(a, d))
            plan = _attempt(probe, plan, change, "fewer blocks")
    if not enough() and not image_first:
        plan = _smaller_image(probe, plan, arguments_of, reduction)
    wide = plan
    for divisor in DIVISORS:
        if not enough():
            change = _per_class(arguments_of, lambda a, k=divisor: width_changes(a, k))
            narrow = _attempt(probe, wide, change, f"width / {divisor}")
            plan = narrow if narrow.cost.work < plan.cost.work else plan
    return plan


def _per_class(
    arguments_of: Mapping[type, Arguments], make: Callable[[Arguments], Changes]
) -> dict[type, Changes]:
    found = {cls: make(arguments) for cls, arguments in arguments_of.items()}
    return {cls: changes for cls, changes in found.items() if changes}


def _smaller_image(
    probe: Probe, plan: Plan, arguments_of: Mapping[type, Arguments], reduction: int
) -> Plan:
    height, width = plan.image_size
    for side in GRIDS:
        scale = side * reduction / min(height, width)
        if scale >= 1:
            break
        size = (
            max(side, round(height * scale / reduction)) * reduction,
            max(side, round(width * scale / reduction)) * reduction,
        )
        changes = _per_class(arguments_of, lambda a, s=size: _image_changes(a, s))
        cost = probe.cost(_merged(plan.changes_of, changes), size)
        if cost is not None and cost.work < plan.cost.work:
            words = f"{size[0]} px" if size[0] == size[1] else f"{size[0]} x {size[1]} px"
            return Plan(size, cost, _merged(plan.changes_of, changes), (*plan.in_words, words))
    return plan


def _image_changes(arguments: Arguments, size: tuple[int, int]) -> Changes:
    changes: dict[Path, Replacement] = {}
    for name in IMAGE:
        value = arguments.get(name)
        if isinstance(value, int):
            changes[(name,)] = max(size)
        elif isinstance(value, tuple | list) and len(value) == 2:
            changes[(name,)] = size
    return changes


def _attempt(probe: Probe, plan: Plan, change: Mapping[type, Changes], words: str) -> Plan:
    """The plan with a change, or with those of its arguments that can be changed one by one."""
    together = _try(probe, plan, change)
    if together is not None:
        return _described(together, plan, words)
    names = [(cls, name) for cls, changes in change.items() for name in _names(changes)]
    result = plan
    for cls, name in names if len(names) > 1 else ():
        part = {cls: {path: new for path, new in change[cls].items() if path[0] == name}}
        result = _try(probe, result, part) or result
    return result if result is plan else _described(result, plan, words)


def _try(probe: Probe, plan: Plan, change: Mapping[type, Changes]) -> Plan | None:
    if not change:
        return None
    changes_of = _merged(plan.changes_of, change)
    cost = probe.cost(changes_of, plan.image_size)
    if cost is None or cost.work >= plan.cost.work:
        return None
    return replace(plan, cost=cost, changes_of=changes_of)


def _described(made: Plan, before: Plan, words: str) -> Plan:
    names = [
        name
        for cls, changes in made.changes_of.items()
        for name in _names(
            {p: n for p, n in changes.items() if before.changes_of.get(cls, {}).get(p) != n}
        )
    ]
    kept = [text for text in before.in_words if not text.startswith(words)]
    return replace(made, in_words=(*kept, f"{words} ({', '.join(dict.fromkeys(names))})"))


def _names(changes: Changes) -> list[str]:
    return list(dict.fromkeys(str(path[0]) for path in changes))


def _merged(first: Mapping[type, Changes], second: Mapping[type, Changes]) -> dict[type, Changes]:
    classes = dict.fromkeys([*first, *second])
    return {cls: {**first.get(cls, {}), **second.get(cls, {})} for cls in classes}


def depth_changes(arguments: Arguments, depth: int) -> Changes:
    """Counts of blocks cut to `depth`, and lists of equal blocks to as many items."""
    changes: dict[Path, Replacement] = {}
    for path, value in _walk(arguments):
        name = _last_name(path)
        if isinstance(value, int) and not isinstance(value, bool):
            if value > depth and DEPTH.search(name) and not NOT_DEPTH.search(name):
                changes[path] = depth
            elif value >= depth and BOUNDARY.search(name):
                changes[path] = depth // 2
        elif isinstance(value, list | tuple) and _is_stage(path, value) and len(value) > depth:
            changes[path] = KeepFirst(depth)
    return changes


def _is_stage(path: Path, value: Sequence[Any]) -> bool:
    """A list of block descriptions inside a list of stages: what stands in it is repeated."""
    inside = len(path) >= 2 and isinstance(path[-1], int)
    return inside and len(value) > 1 and all(_is_description(item) for item in value)


def _is_description(value: Any) -> bool:
    return not isinstance(value, str | int | float | bool | None) and bool(children(value))


def width_changes(arguments: Arguments, divisor: int) -> Changes:
    """Channels and heads divided, so that channels of a head stay as many as they were."""
    changes: dict[Path, Replacement] = {}
    for path, value in _walk(arguments):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        name = _last_name(path)
        if isinstance(value, float):
            if value > SMALLEST_WIDTH and WIDTH.search(name):
                changes[path] = value / divisor
        elif HEADS.search(name):
            if value > 1:
                changes[path] = max(1, value // divisor)
        elif WIDTH.search(name) and not NOT_WIDTH.search(name) and value > SMALLEST_WIDTH:
            changes[path] = _rounded(value / divisor)
    return changes


def _rounded(width: float) -> int:
    """To a multiple of 8, which classes ask for and groups need."""
    return max(SMALLEST_WIDTH, round(width / SMALLEST_WIDTH) * SMALLEST_WIDTH)


def _walk(arguments: Arguments) -> Iterator[tuple[Path, Any]]:
    """Every part of every argument, with its path."""

    def walk(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
        yield path, value
        if len(path) < 8:
            for key, item in children(value):
                yield from walk((*path, key), item)

    for name, value in arguments.items():
        if not isinstance(value, nn.Module):
            yield from walk((name,), value)


def _last_name(path: Path) -> str:
    return next(key for key in reversed(path) if isinstance(key, str))
