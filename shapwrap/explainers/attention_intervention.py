"""Changes what attention gives, or what is added to the tokens, while a model runs its own code."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shapwrap.explainers.attention_recorder import (
    ADDITIONS,
    MATRIX_PRODUCTS,
    PRODUCTS,
    SOFTMAXES,
    Addition,
    AttentionLayer,
    AttentionRecorder,
)
from shapwrap.explainers.explicit_attention import Attended, Weights, attend

AttentionRule = Callable[[int, Attended], Tensor]
"""Number of the attention and what it computed, to the output that it gives instead."""
AdditionRule = Callable[[int, int, Addition], Tensor]
"""Number of the attention, number of the addition after it and the addition, to its result."""

QUOTIENTS = {torch.div, torch.Tensor.div, torch.Tensor.__truediv__}
# What scores may go through between the product of queries and keys and the softmax.
CARRIED = {
    *ADDITIONS,
    *PRODUCTS,
    *QUOTIENTS,
    torch.masked_fill,
    torch.Tensor.masked_fill,
    torch.Tensor.float,
    torch.Tensor.to,
}


class _Scores(NamedTuple):
    """Scores of attention written by hand, and what they are the product of."""

    scores: Weights
    query: Tensor | None
    key: Tensor | None
    factor: float = 1.0
    """What the product was multiplied by."""

    def unscaled_query(self) -> Tensor | None:
        """The query before any scaling: scores are its product with the key, over sqrt(D)."""
        if self.query is None:
            return None
        return self.query * (self.factor * math.sqrt(self.query.shape[-1]))


class AttentionIntervention(AttentionRecorder):
    """A recorder that hands on something else than what was computed; the model is not changed.

    Args:
        attention: What self-attention gives, for every block; by default what it computed.
        addition: What comes of tokens + branch; by default their sum.
    """

    def __init__(
        self, *, attention: AttentionRule | None = None, addition: AdditionRule | None = None
    ):
        super().__init__()
        self._attention = attention
        self._addition = addition
        self._scores: dict[int, _Scores] = {}

    def attend(self, *args: Any, **kwargs: Any) -> Attended:
        """Fused attention, written out, with another output."""
        return self._instead(attend(*args, **kwargs))

    def _instead(self, attended: Attended) -> Attended:
        queries, keys = attended.weights.shape[-2:]
        if self._attention is None or queries != keys:
            return attended
        return attended._replace(output=self._attention(len(self.layers), attended))

    def _look(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        if func in MATRIX_PRODUCTS and args[0].ndim == 4 == args[1].ndim:
            self._scores[id(output)] = _Scores(output, args[0], args[1].transpose(-2, -1))
        elif func in CARRIED and output.ndim == 4:
            found = next((self._scores[id(a)] for a in args if id(a) in self._scores), None)
            if found is not None:
                factor = found.factor * _factor(func, args)
                self._scores[id(output)] = found._replace(scores=output, factor=factor)
        elif func in SOFTMAXES and args and output.ndim == 4:
            self._scores[id(output)] = self._scores.get(id(args[0]), _Scores(args[0], None, None))
        return super()._look(func, args, kwargs, output)

    def _attend_by_hand(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weights = self._sources[id(args[0])]
        found = self._scores.get(id(weights))
        if found is not None and args[1].ndim == 4:
            query = found.unscaled_query()
            attended = Attended(output, weights, args[1], found.scores, query, found.key)
            output = self._instead(attended).output
        self._scores.clear()
        return super()._attend_by_hand(args, output)

    def _add(self, layer: AttentionLayer, args: tuple[Any, ...], output: Tensor) -> Tensor:
        before = len(layer.additions)
        output = super()._add(layer, args, output)
        if self._addition is None or len(layer.additions) == before:
            return output
        result = self._addition(len(self.layers) - 1, before, layer.additions[-1])
        layer.additions[-1] = layer.additions[-1]._replace(result=result)
        return result


def _factor(func: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """The number by which a function multiplies a tensor; 1 where it is not a plain number."""
    numbers = [float(arg) for arg in args[:2] if isinstance(arg, int | float)]
    if not numbers or not numbers[0]:
        return 1.0
    if func in QUOTIENTS:
        return 1 / numbers[0]
    return numbers[0] if func in PRODUCTS else 1.0


def batch_axis(tensor: Tensor, batch: int) -> int:
    """Which axis of tokens is that of the images, where it is not as long as that of the tokens."""
    return 0 if len(tensor) == batch else 1


def batch_first(tensor: Tensor, batch: int) -> Tensor:
    """Tokens as [B, T, D]."""
    return tensor.movedim(batch_axis(tensor, batch), 0)
