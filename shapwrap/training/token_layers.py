"""Which linear layers of a model make up its attention and its MLPs, found while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shapwrap.probing import random_images, undisturbed
from shapwrap.training.trainable import head_of, without_gradients
from shapwrap.wrapper import ShapleyWrapper

ATTENTIONS = {
    functional.scaled_dot_product_attention,
    functional.multi_head_attention_forward,
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
}
"""What an attention calls, one or the other."""


class TokenLayers(NamedTuple):
    """Names of layers in `wrapped.model` through which every token goes."""

    attention: list[str]
    """Linear layers in a module that attends, and nn.MultiheadAttention."""
    mlp: list[str]
    """Linear layers beside another one in a module that does not attend."""

    def of(self, targets: str) -> list[str]:
        """Those of "attention", "mlp" or "all"."""
        kinds = {"attention": self.attention, "mlp": self.mlp}
        return kinds[targets] if targets in kinds else self.attention + self.mlp


def token_layers(wrapped: ShapleyWrapper) -> TokenLayers:
    """The layers that the wrapped model calls, outside its head, on every token of an image.

    Layers whose weights a model reads without calling them (the joint projection of BEiT) are left
    out, and so are those that read no image (tables of positions) and single ones (patch
    embeddings, projections between stages).
    """
    model = wrapped.model
    head = {id(parameter) for parameter in head_of(wrapped)}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.MultiheadAttention)
        and not any(id(parameter) in head for parameter in module.parameters())
    }
    images = random_images(wrapped._wrapping.backbone, wrapped.image_size, batch=1)
    images.requires_grad_()
    with undisturbed(model), without_gradients(model.parameters()), torch.enable_grad():
        # Only what comes from the pixels then requires a gradient.
        with _Watch(model) as own:
            model(images)
        with _Watch(model) as replayed:
            wrapped(images, coalitions_of_halves(wrapped), paired=True)
    used = {n for n, module in candidates.items() if module in own.tokens & replayed.tokens}
    places = {module: name for name, module in model.named_modules()}
    attending: set[str] = set()
    for stack in own.attentions:
        held = (name for name in map(places.__getitem__, reversed(stack)) if name)
        attending.update([name for name in held if _within(used, name)][:1])
    # What holds another attention does not attend itself.
    attending = {name for name in attending if _within(attending, name) == {name}}
    attention = {name for place in attending for name in _within(used, place)}
    attention |= {n for n in used if isinstance(candidates[n], nn.MultiheadAttention)}
    return TokenLayers(
        [name for name in candidates if name in attention],
        [n for n in candidates if n in used - attention and _has_company(n, used, attention)],
    )


def coalitions_of_halves(wrapped: ShapleyWrapper) -> Tensor:
    """One complement pair, bool [1, 2, N]."""
    first = torch.arange(wrapped.num_patches) % 2 == 0
    return torch.stack((first, ~first))[None]


def _within(names: set[str], place: str) -> set[str]:
    return {name for name in names if name == place or name.startswith(f"{place}.")}


def _has_company(name: str, used: set[str], attention: set[str]) -> bool:
    """Whether the innermost module with this layer and another one, below the model, is an MLP."""
    place = name
    while place and _within(used, place) == {name}:
        place = place.rpartition(".")[0]
    return bool(place) and not _within(attention, place)


class _Watch(TorchFunctionMode):
    """Layers called on tokens that come from an image, and the modules around each attention."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tokens: set[nn.Module] = set()
        self.attentions: list[list[nn.Module]] = []
        self._model = model
        self._stack: list[nn.Module] = []

    def __enter__(self) -> "_Watch":
        self._handles: list[Any] = []
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._open))
            self._handles.append(module.register_forward_hook(self._close))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and remembers where an attention was."""
        if func in ATTENTIONS and self._stack:
            self.attentions.append(list(self._stack))
        return func(*args, **(kwargs or {}))

    def _open(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._stack.append(module)
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and first.ndim >= 3 and first.requires_grad:
            self.tokens.add(module)

    def _close(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._stack.pop()


@contextmanager
def called(modules: list[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of the modules that are called inside."""
    found: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: found.add(module)) for module in modules
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
