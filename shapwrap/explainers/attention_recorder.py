"""Watches one forward pass: attention weights, values and the tokens that attention is added to.

Nothing of the model is changed for it. PyTorch itself tells of each function that is called, so
fused and hand-written attention, nn.MultiheadAttention and the replayed blocks of a wrapped model
all look the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shapwrap.explainers.explicit_attention import (
    Attended,
    Projection,
    Values,
    Weights,
    attend,
    multi_head,
)

ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.__radd__}
IN_PLACE_ADDITIONS = {torch.Tensor.add_, torch.Tensor.__iadd__}
PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__rmul__}
MATRIX_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
SOFTMAXES = {torch.softmax, torch.Tensor.softmax, functional.softmax}
DROPOUTS = {torch.dropout, functional.dropout}


class Addition(NamedTuple):
    """Tokens plus what a branch made of them."""

    shortcut: Tensor
    branch: Tensor
    result: Tensor


@dataclass
class AttentionLayer:
    """One attention, and what happened between it and the next one."""

    weights: Weights
    values: Values
    projection: Projection | None = None
    """The first linear layer that read all heads."""
    projected: Tensor | None = None
    """What that layer gave, [B, T, D] or [T, B, D]."""
    scale: Tensor | None = None
    """What the output of that layer was multiplied by, one number a feature (layer scale)."""
    additions: list[Addition] = field(default_factory=list)
    """Residual additions, the attention's own first."""
    in_place: bool = False
    """Whether tokens were added to in place, so that their earlier states are lost."""

    def holds_tokens(self, tensor: Tensor) -> bool:
        """Whether the tensor has one vector a token, [B, T, D] or [T, B, D]."""
        size = (len(self.weights), self.weights.shape[-1])
        return tensor.ndim == 3 and tuple(tensor.shape[:2]) in (size, size[::-1])


class AttentionRecorder(TorchFunctionMode):
    """Records what runs inside `with`; fused attention is computed in a differentiable way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[AttentionLayer] = []
        """Self-attention, in order."""
        self.poolings: list[tuple[int, Weights]] = []
        """Attention by other queries than the tokens, with the number of layers before it."""
        self.softmaxes: dict[int, Tensor] = {}
        """Softmaxes that no attention was seen to use, and what plain dropout made of them."""
        self._sources: dict[int, Tensor] = {}
        self._made: dict[int, tuple[int, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the function, or attention in its place, and looks at what came of it."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            attended = self.attend(*args, **kwargs)
            self._start(attended.weights, attended.values)
            return attended.output
        if func is functional.multi_head_attention_forward:
            computed = multi_head(*args, **kwargs, through=self.attend)
            layer = self._start(computed.attended.weights, computed.attended.values)
            if layer is not None:
                layer.projection, layer.projected = computed.projection, computed.output
                self._remember(computed.output)
            return computed.output, computed.returned_weights
        output = func(*args, **kwargs)
        return self._look(func, args, kwargs, output) if isinstance(output, Tensor) else output

    def attend(self, *args: Any, **kwargs: Any) -> Attended:
        """Fused attention, written out."""
        return attend(*args, **kwargs)

    def _start(self, weights: Weights, values: Values) -> AttentionLayer | None:
        if weights.shape[-2] != weights.shape[-1]:
            self.poolings.append((len(self.layers), weights))
            return None
        self._made.clear()
        self.layers.append(AttentionLayer(weights, values))
        return self.layers[-1]

    def _look(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """The output of a function, after it was looked at."""
        if func in SOFTMAXES and output.ndim >= 3:
            self.softmaxes[id(output)] = self._sources[id(output)] = output
        elif func in DROPOUTS and args and id(args[0]) in self._sources:
            self._pass_dropout(args[0], output)
        elif func in MATRIX_PRODUCTS and id(args[0]) in self._sources:
            output = self._attend_by_hand(args, output)
        if not self.layers:
            return output
        layer = self.layers[-1]
        if func is functional.linear and layer.projection is None and not layer.additions:
            self._project(layer, output, *args, **kwargs)
        if not layer.holds_tokens(output):
            return output
        if func in IN_PLACE_ADDITIONS:
            layer.in_place = True
        elif func in PRODUCTS and layer.projection is not None and not layer.additions:
            self._scale(layer, args, output)
        elif func in ADDITIONS:
            output = self._add(layer, args, output)
        self._remember(output)
        return output

    def _pass_dropout(self, source: Tensor, output: Tensor) -> None:
        """Dropout in eval mode hands on what it gets."""
        if torch.equal(source, output):
            self._sources[id(output)] = self._sources[id(source)]
            # Keeps the tensor alive: its id must not be given to another one.
            self.softmaxes[id(output)] = output

    def _attend_by_hand(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weights, values = self._sources[id(args[0])], args[1]
        if weights.ndim != 4 or values.ndim != 4:
            return output
        for handed in (weights, args[0]):
            self.softmaxes.pop(id(handed), None)
            self._sources.pop(id(handed), None)
        self._start(weights, values)
        return output

    def _project(
        self,
        layer: AttentionLayer,
        output: Tensor,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        width = layer.values.shape[-3] * layer.values.shape[-1]
        if layer.holds_tokens(given) and given.shape[-1] == width:
            layer.projection, layer.projected = Projection(weight, bias), output

    def _scale(self, layer: AttentionLayer, args: tuple[Any, ...], output: Tensor) -> None:
        for factor in args[:2]:
            if isinstance(factor, Tensor) and factor.shape == output.shape[-1:]:
                layer.scale = factor if layer.scale is None else layer.scale * factor

    def _add(self, layer: AttentionLayer, args: tuple[Any, ...], output: Tensor) -> Tensor:
        first, second = args[:2]
        if not isinstance(second, Tensor) or first.shape != second.shape:
            return output
        # What is older is the shortcut; what attention gave rise to is the branch.
        shortcut, branch = sorted((first, second), key=self._age)
        known = self._age(shortcut) >= 0 if layer.additions else self._age(shortcut) < 0
        if known and self._age(branch) >= 0:
            layer.additions.append(Addition(shortcut, branch, output))
        return output

    def _age(self, tensor: Tensor) -> int:
        """Place among the tensors made since the last attention; -1 if it is older."""
        return self._made[id(tensor)][0] if id(tensor) in self._made else -1

    def _remember(self, tensor: Tensor) -> None:
        self._made.setdefault(id(tensor), (len(self._made), tensor))
