"""The operations of one forward pass, in the order in which they ran."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from shapwrap.explainers.explicit_attention import attend, multi_head

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _attend(*arguments: Any, **keywords: Any) -> Tensor:
    return attend(*arguments, **keywords).output


def _multi_head(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    computed = multi_head(*arguments, **keywords)
    return computed.output, computed.returned_weights


UNFUSED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attend,
    "multi_head_attention_forward": _multi_head,
}
"""Fused attention as the single operations that it stands for, by the name of the function."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch function that read something computed from the images."""

    name: str
    """Of the function, without underscores around it: `__add__` and `torch.add` are "add"."""
    function: Callable[..., Any]
    arguments: Arguments
    keywords: Keywords
    inputs: tuple[Tensor, ...]
    """What it read that depends on the images, each tensor once."""
    outputs: tuple[Tensor, ...]
    """What it returned that gradients flow through."""
    versions: tuple[int, ...]
    """Of inputs and outputs, when the call returned: later in-place changes show."""
    in_place: bool
    """Whether it changed an argument."""
    untracked: bool
    """Whether it read a tensor with a gradient whose making the tape did not see."""

    def again(self, values: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """The outputs, computed anew with other tensors in the place of some, by their id."""
        made = self.function(
            *_replaced(self.arguments, values),
            **{key: _replaced(given, values) for key, given in self.keywords.items()},
        )
        return tuple(tensor for tensor in tensors_in(made) if tensor.requires_grad)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(tensors_in((self.arguments, self.keywords)))

    def overwritten(self) -> bool:
        """Whether inputs or outputs no longer hold what they held when the call returned."""
        return self.versions != _versions((*self.inputs, *self.outputs))


class Tape(TorchFunctionMode):
    """Records, while active, what is computed from `images` by torch functions.

    No module is touched. Fused attention is recorded as the products and the softmax that it
    consists of, so that attention probabilities exist whatever the model's flags say.

    Args:
        images: They must ask for a gradient; what gets none of it is a constant here.
    """

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images
        self.operations: list[Operation] = []
        self._live = {id(images)}
        # Ids are those of living objects; a tensor that were freed could lend its id to another.
        self._seen: dict[int, Tensor] = {id(images): images}

    def is_live(self, value: object) -> bool:
        """Whether this is a tensor that depends on the images."""
        return id(value) in self._live

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Runs one torch function, and records it."""
        keywords = kwargs or {}
        name = _name(func)
        if name in UNFUSED:
            with self:
                return UNFUSED[name](*args, **keywords)
        given = list(tensors_in((args, keywords)))
        before = _versions(given)
        made = func(*args, **keywords)
        changed = [t for t, version in zip(given, before, strict=True) if _version(t) != version]
        self._record(name, func, args, keywords, given, made, changed)
        return made

    def _record(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: Arguments,
        keywords: Keywords,
        given: list[Tensor],
        made: Any,
        changed: list[Tensor],
    ) -> None:
        untracked = any(t.grad_fn is not None and id(t) not in self._seen for t in given)
        inputs = tuple({id(t): t for t in given if id(t) in self._live}.values())
        returned = [t for t in tensors_in(made) if changed or all(t is not g for g in given)]
        outputs = tuple({id(t): t for t in (*returned, *changed) if t.requires_grad}.values())
        if untracked and not inputs:
            # What comes of a tensor of unknown making is of unknown making itself.
            return
        self._seen |= {id(t): t for t in outputs}
        if not inputs or not outputs:
            return
        self._live |= {id(t) for t in outputs}
        self.operations.append(
            Operation(
                name=name,
                function=function,
                arguments=arguments,
                keywords=keywords,
                inputs=inputs,
                outputs=outputs,
                versions=_versions((*inputs, *outputs)),
                in_place=bool(changed),
                untracked=untracked,
            )
        )


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _replaced(value: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return values.get(id(value), value)
    if isinstance(value, tuple | list) and any(id(t) in values for t in tensors_in(value)):
        return type(value)(_replaced(item, values) for item in value)
    return value


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        # A property, such as Tensor.mT.
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.removeprefix("__").removesuffix("__") if name.startswith("__") else name


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(_version(tensor) for tensor in tensors)
