"""Input times gradient, computed by captum."""

import torch
from jaxtyping import Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import captum_attr, full_logits, in_full


class InputXGradient(Explainer):
    """x times the gradient of f_c at x, summed over channels, and over the pixels of a patch.

    The values sum to f_c(x) for a model that is homogeneous in its pixels (no biases, as X-DNN),
    and to nothing known for others, so no sum is claimed.

    Args:
        model: A module, a wrapped model, or any differentiable function with `grid`.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.
        absolute: Sum the magnitudes of channels instead.

    Raises:
        ArgumentError: An option outside its range.
        BackboneTypeError: Neither a module nor a function.
        MissingDependencyError: captum is not installed.

    References:
        Shrikumar et al. 2016, "Not Just a Black Box"; Hesse, Schaub-Meyer & Roth 2021, "Fast
        Axiomatic Attribution for Neural Networks".
    """

    name = "input-x-gradient"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        chunk_size: int = 64,
        absolute: bool = False,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        captum_attr()
        self.absolute = absolute

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Values of pixels and patches; one forward and one backward an image."""
        method = captum_attr().InputXGradient(full_logits(self.model, images.dtype))
        parts = []
        for part, classes in zip(
            images.split(self.chunk_size), target.split(self.chunk_size), strict=True
        ):
            # captum sets requires_grad on what it is given, and warns of it.
            leaf = in_full(part).clone().requires_grad_()
            parts.append(method.attribute(leaf, target=classes).detach())
        made = torch.cat(parts)
        return self.of_pixels((made.abs() if self.absolute else made).sum(dim=1), images)
