"""The readout of heads that read a class token: the head stays, patches share what it gained."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from shapwrap._types import PooledFeatures, PreLogits
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.masking.pooling import compute_dtype
from shapwrap.readout.readouts import EfficiencyGapReadout, PreLogitFunction


class ClassTokenReadout(EfficiencyGapReadout):
    """The head reads the class token c, of which the features [e_n, c] of each patch hold a copy.

    z_n = h(c) + G e_n - mean_m G e_m, the linear layer G zero at the start. What the class token
    says of no patch at all is the baseline v(0), and v(s) = f(x_s) - v(0) is in no proportion to
    |s|, so that an even spread of the logits does not look like an explanation.
    """

    name = "class-token"

    def __init__(
        self,
        backbone: TokenBackbone,
        pre_logits: PreLogitFunction,
        own_width: int,
        layer: nn.Linear,
        new_head: nn.Module | None,
    ):
        super().__init__(pre_logits, own_width, layer)
        self._backbone = backbone
        self._new_head = new_head
        self._remembered: Remembered | None = None

    @override
    def pooled(self, means: PooledFeatures) -> PreLogits:
        return self.pre_logits(self._backbone.read_by_head(means))

    @override
    def nobody(self) -> PreLogits:
        # The same for all images: while nothing is trained, one pass serves many explanations.
        model = self._backbone.model
        if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
            self._remembered = None
            return self._of_nobody()
        if self._remembered is None or not self._remembered.still_holds(*self._read_by_nobody()):
            result = self._of_nobody()
            self._remembered = Remembered.now(result, *self._read_by_nobody())
        return self._remembered.result

    def _of_nobody(self) -> PreLogits:
        alone = self._backbone.class_token_alone()
        return self.pre_logits(alone.to(compute_dtype(alone)))

    def _read_by_nobody(self) -> tuple[list[Tensor], list[Tensor]]:
        """All weights and statistics, and those few that are worth a look at their numbers."""
        owners = [self._backbone.model]
        few: list[Tensor] = [*self._backbone.prefix_parameters()]
        if self._new_head is not None:
            owners.append(self._new_head)
            few += self._new_head.parameters()
        return [one for owner in owners for one in (*owner.parameters(), *owner.buffers())], few


class Remembered(NamedTuple):
    """A result, and the weights that it came from."""

    result: Tensor
    versions: list[tuple[int, int]]
    numbers: list[Tensor]

    @classmethod
    def now(cls, result: Tensor, weights: list[Tensor], few: list[Tensor]) -> "Remembered":
        """A result of the weights as they are."""
        return cls(result, _versions(weights), [weight.detach().clone() for weight in few])

    def still_holds(self, weights: list[Tensor], few: list[Tensor]) -> bool:
        """Whether no weight has changed since."""
        if self.versions != _versions(weights):
            return False
        # A write through `.data`, as some optimizers and averages of weights do it, leaves no other
        # trace; the class token and a new head are among what they write.
        return all(torch.equal(then, now) for then, now in zip(self.numbers, few, strict=True))


def _versions(weights: list[Tensor]) -> list[tuple[int, int]]:
    return [
        # Tensors made in inference mode count no versions.
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for weight in weights
    ]
