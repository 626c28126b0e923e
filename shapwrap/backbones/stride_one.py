"""A layer's stride-1 form: the same layer, evaluated at every position of its input.

With the padding before the first row and column as it was, position 2i of the finer output sees
what position i of the native one saw. Layers that pad dynamically, as TensorFlow's SAME does, pad
one more before an input of even size once their stride is 1, so there it is position 2i + 1, which
also keeps each position over its own pixels. Either way every native output is among the finer
ones; that is not assumed of a layer but checked on what it was given and returned.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from shapwrap._types import Grid
from shapwrap.errors import GridError

_POOLS = (nn.AvgPool2d, nn.MaxPool2d)


class LayerCall(NamedTuple):
    """What a layer was given and what it returned."""

    name: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def __str__(self) -> str:
        """The layer by its place in the model and its class."""
        return f"{self.name} ({type(self.layer).__name__})"


@dataclass
class BorderPadding:
    """Pads what enters a layer whose windows end before the border, so that its map fills a grid.

    Each native position gets its two finer ones, but no position begins outside the input. Pools
    repeat the border, so that a window that reaches over it sees the present values alone.
    """

    lost: tuple[int, int]
    """Rows and columns by which the output at stride 1 is smaller than the input."""
    strides: tuple[int, int]
    """Native strides."""
    ceil_mode: bool
    """Whether the native layer keeps windows that reach over the border."""
    mode: str
    """As in `torch.nn.functional.pad`."""
    leading: bool = False
    """Pad before the first row and column where the size is even, next to layers that do so."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the layer, the first one padded; a forward pre-hook."""
        rows, columns = (self._amounts(axis, args[0].shape[axis - 2]) for axis in (0, 1))
        if rows == columns == (0, 0):
            return args
        return functional.pad(args[0], (*columns, *rows), mode=self.mode), *args[1:]

    def _amounts(self, axis: int, size: int) -> tuple[int, int]:
        stride, windows = self.strides[axis], size - self.lost[axis]
        if stride == 1:
            return 0, 0
        last = windows - 1 + (stride - 1 if self.ceil_mode else 0)
        native = last // stride + 1
        wanted = max(min(size, native * stride), (native - 1) * stride + 1)
        missing = max(0, wanted - windows)
        return (missing, 0) if self.leading and size % 2 == 0 else (0, missing)


@dataclass(eq=False)
class StrideChange:
    """One layer that runs at stride 1, and how to give it back its own stride."""

    layer: Any
    stride: Any
    """The native stride, as the layer spells it: an int, a tuple or a list."""
    padding: BorderPadding | None = None
    handle: RemovableHandle | None = field(default=None, repr=False)

    def apply(self) -> None:
        """Run the layer at stride 1."""
        self.layer.stride = 1 if isinstance(self.stride, int) else type(self.stride)((1, 1))
        if self.padding is not None:
            self.handle = self.layer.register_forward_pre_hook(self.padding, prepend=True)

    def undo(self) -> None:
        """Give the layer its stride back."""
        self.layer.stride = self.stride
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def restore(changes: Iterable[StrideChange]) -> None:
    """Give all layers their strides back."""
    for change in changes:
        change.undo()


@contextmanager
def native_strides(changes: Iterable[StrideChange]) -> Iterator[None]:
    """All layers have their own strides inside, and run at stride 1 again afterwards."""
    changes = list(changes)
    restore(changes)
    try:
        yield
    finally:
        for change in changes:
            change.apply()


def to_stride_one(call: LayerCall, *, leading: bool = False) -> tuple[StrideChange, Grid]:
    """Sets the stride of a layer to 1; returns the change and where native positions went.

    Position i of the native output is position 2i + offset of the finer one; the offset of rows
    and columns is returned.

    Args:
        call: A native call of the layer, with which the stride-1 form is compared.
        leading: Pad before an input of even size rather than after it, where the layer needs it.

    Raises:
        GridError: The layer has no stride-1 form, with the reason; it is unchanged.
    """
    layer: Any = call.layer
    stride = getattr(layer, "stride", None)
    pair = (stride, stride) if isinstance(stride, int) else stride
    if not (isinstance(pair, tuple | list) and all(isinstance(step, int) for step in pair)):
        raise GridError(f"its map is made by {call}, which has no stride to set to 1")
    rows, columns = pair
    if not {rows, columns} <= {1, 2} or rows == columns == 1:
        raise GridError(
            f"its map is made by {call} of stride {stride}, and only layers of stride 2 become a "
            "finer level at stride 1"
        )
    change = StrideChange(layer, stride)
    change.apply()
    try:
        size, finer = call.args[0].shape[-2:], _run(call).shape[-2:]
        lost = (size[0] - finer[0], size[1] - finer[1])
        ceil_mode = bool(getattr(layer, "ceil_mode", False))
        if ceil_mode or max(lost) > 0:
            mode = "replicate" if isinstance(layer, _POOLS) else "constant"
            change.padding = BorderPadding(lost, (rows, columns), ceil_mode, mode, leading)
            change.apply()
        return change, _offset(call, (rows, columns))
    except BaseException:
        change.undo()
        raise


def _run(call: LayerCall) -> Tensor:
    return call.layer(*call.args, **call.kwargs)


def _offset(call: LayerCall, strides: Grid) -> Grid:
    """Where the native output is found among the finer one."""
    finer, native = _run(call), call.output
    # TF32 rounds differently in kernels of other strides; a wrong position differs by far more.
    tolerance = 1e-2 * float(native.abs().max())
    for row in range(strides[0]):
        for column in range(strides[1]):
            found = finer[..., row :: strides[0], column :: strides[1]]
            if found.shape == native.shape and torch.allclose(found, native, 0.0, tolerance):
                return row, column
    raise GridError(
        f"its map is made by {call}, which at stride 1 does not compute what it did at stride 2, "
        "position by position"
    )
