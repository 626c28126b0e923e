"""A model that explains itself enters a comparison like any other method."""

from typing import Any

from torch import Tensor

from shapwrap.errors import BackboneTypeError
from shapwrap.explanation import Explanation


class SelfExplaining:
    """What a model says of itself: a wrapped model, or anything with an `explain` like it.

    Args:
        model: Has `explain(images, target)` that returns an `Explanation`.
        name: As in tables.

    Raises:
        BackboneTypeError: The model has no `explain`.
    """

    def __init__(self, model: Any, *, name: str = "shapley", contrast: bool = False):
        if not callable(getattr(model, "explain", None)):
            raise BackboneTypeError(
                f"model is {type(model).__name__}; expected one with explain(images, target), "
                "such as ShapleyWrapper(model)."
            )
        self.model = model
        self.name = name
        self._options = {"contrast": True} if contrast else {}

    def __call__(self, images: Tensor, target: int | Tensor | None = None) -> Explanation:
        """The model's own explanation; see `ShapleyWrapper.explain`."""
        return self.model.explain(images, target, **self._options)
