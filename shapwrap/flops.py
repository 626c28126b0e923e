"""Floating-point operations of any call, backward passes included."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def count_operations(call: Callable[[], object]) -> int:
    """Multiply-adds of a call: matrix products, convolutions and attention, forward and backward.

    Counted as torch's FlopCounterMode does, halved; elementwise operations are left out. Unlike it,
    no hooks are put on any module, so gradients may be on or off, layers may read slices of
    parameters, and methods may use hooks of their own.
    """
    counter = _Counter()
    with _products_in_sight(), counter:
        call()
    return counter.operations // 2


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and add what it takes."""
        options = dict(kwargs or {})
        out = func(*args, **options)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **options, out_val=out)
        return out


@contextmanager
def _products_in_sight() -> Iterator[None]:
    """Attention runs as matrix products: fused kernels of some devices would count as nothing."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
