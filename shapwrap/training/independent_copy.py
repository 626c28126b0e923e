"""A wrapped model that may be trained without a trace in the one it was copied from."""

import copy
from functools import partial
from types import FunctionType

from shapwrap.errors import ArgumentError
from shapwrap.wrapper import ShapleyWrapper


def independent_copy(wrapped: ShapleyWrapper) -> ShapleyWrapper:
    """A copy that shares no weight with the original.

    Raises:
        ArgumentError: `features=` or `head=` of the wrapper are functions, which may hold parts of
            the original.
    """
    held = vars(wrapped._wrapping.backbone)
    functions = [name for name, value in held.items() if isinstance(value, FunctionType | partial)]
    if functions:
        raise ArgumentError(
            "shapley_weight is 'auto', which trains a copy of the model first, but features= or "
            "head= of this wrapper are functions, and a copy would call the original's layers "
            "through them. Name submodules instead, or give a number."
        )
    return copy.deepcopy(wrapped)
