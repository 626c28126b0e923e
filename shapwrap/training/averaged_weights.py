"""The exponential moving average of the weights that a run trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shapwrap.errors import TrainingError
from shapwrap.masking.batch_norm import batch_norms
from shapwrap.masking.pooling import compute_dtype
from shapwrap.training.run_state import placed_like


class AveragedWeights:
    """Averages of the trainable parameters and of moving batch statistics, in at least float32.

    After step t, average = d * average + (1 - d) * weight with d = min(decay, (1 + t) / (10 + t)),
    so that the weights of the start, a head of zeros among them, are soon forgotten.

    Args:
        module: Whose weights are averaged; each process averages what it holds.
        decay: Largest d.
    """

    def __init__(self, module: nn.Module, decay: float):
        self._decay = decay
        # Where FSDP2 has put weights together, the next pass would see those of before.
        self._split: list[Any] = [
            part for part in module.modules() if hasattr(type(part), "reshard")
        ]
        self._weights: dict[str, Tensor] = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        statistics = {id(b) for layer in batch_norms(module) for b in layer.buffers()}
        self._weights |= {
            name: buffer
            for name, buffer in module.named_buffers()
            if id(buffer) in statistics and buffer.is_floating_point()
        }
        self._averages = {
            name: weight.detach().to(compute_dtype(weight), copy=True)
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the weights after this step in; the first step is 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = [
            weight.detach().to(average.dtype)
            for weight, average in zip(self._weights.values(), self._averages.values(), strict=True)
        ]
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), current, step)

    def put_in_place(self) -> None:
        """The model has the averages as its weights from now on; the averages stay."""
        self._put(self._averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages as its weights inside, and its own weights afterwards."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.put_in_place()
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the weights."""
        return dict(self._averages)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
        for part in self._split:
            part.reshard()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from these averages.

        Raises:
            TrainingError: They are of other weights.
        """
        came = {name: tuple(average.shape) for name, average in state.items()}
        expected = {name: tuple(average.shape) for name, average in self._averages.items()}
        if came != expected:
            wrong = sorted(name for name in came | expected if came.get(name) != expected.get(name))
            raise TrainingError(
                f"the averaged weights of the checkpoint are of {len(came)} tensors, expected "
                f"{len(expected)}, and differ in {', '.join(wrong[:3])}; resume with the same "
                "model and the same parameters to train."
            )
        for name, average in self._averages.items():
            average.copy_(placed_like(average, state[name]))
