"""The one interface of all methods: images and a class in, an explanation out."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.errors import ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.explanation import Explanation, check_target
from shapwrap.masking.pixels import sums_over_patches


class Attribution(NamedTuple):
    """What a method computes; float32, or float64 for a float64 model."""

    values: Float[Tensor, "batch patches"]
    """One a patch, row by row over the grid."""
    grid: Grid
    """Rows and columns."""
    pixels: Float[Tensor, "batch height width"] | None = None
    """One a pixel, for methods that have them; `values` are then their sums."""
    total: Float[Tensor, " batch"] | None = None
    """What the method claims that the values sum to; None for no claim."""


class Explainer(ABC):
    """A method of explanation, bound to a model.

    Calling it leaves the model as it was: mode, hooks, gradients, fused attention.

    Args:
        model: A module, a wrapped model or, where the method looks at no parts, any function from
            normalised images to logits.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time, perturbed copies included.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.
    """

    name: str
    """Short, as in tables and in `Explanation.method`."""
    any_grid: ClassVar[bool] = True
    """Whether values can be given for other patches than the tokens of a transformer."""

    def __init__(self, model: Model, *, grid: Grid | None = None, chunk_size: int = 64):
        check_at_least("chunk_size", chunk_size, 1)
        self.model = ExplainedModel(model, grid=grid)
        self.chunk_size = chunk_size

    def __call__(self, images: Tensor, target: int | Tensor | None = None) -> Explanation:
        """Explanation of one class of each image.

        Args:
            images: Float [B, C, H, W], normalised as the model was trained.
            target: Class index, or one for each image as int64 [B]; the predicted class if None.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape that the model refuses, or pixels that are not finite.
            TargetError: A class that the model does not have.
            ShapwrapError: The method gave NaN or infinity.
        """
        self.model.check(images)
        with self.model.evaluated():
            if images.is_inference():
                images = images.clone()
            with torch.no_grad():
                parts = images.split(self.chunk_size)
                logits = torch.cat([self.model.logits(part) for part in parts])
            # Inference tensors cannot be saved for a backward pass.
            classes = check_target(target, logits).clone()
            made = self.attribute(images.detach(), classes)
            covered = self.model.covered(images)
        if not torch.isfinite(made.values).all():
            raise ShapwrapError(
                f"{self.name} gave values that are not finite; expected finite ones. Run the model "
                "in float32, and look at its logits for these images."
            )
        total = made.total
        if total is None:
            total = made.values.new_full((len(images),), torch.nan)
        return Explanation(
            values=made.values.detach(),
            logits=logits,
            target=classes,
            grid=made.grid,
            image_size=(images.shape[-2], images.shape[-1]),
            class_names=self.model.class_names,
            normalization=self.model.normalization,
            covered=covered,
            method=self.name,
            pixels=None if made.pixels is None else made.pixels.detach(),
            total=total.detach(),
        )

    @abstractmethod
    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """The method itself; runs with the model in eval mode and gradients as the caller has them.

        Args:
            images: Checked, without gradient.
            target: One class an image.
        """

    def of_pixels(
        self,
        pixels: Float[Tensor, "batch height width"],
        images: Images,
        total: Float[Tensor, " batch"] | None = None,
    ) -> Attribution:
        """Values of pixels, and their sums over the patches."""
        grid = self.model.grid_of(images)
        values = sums_over_patches(pixels, grid, self.model.covered(images))
        return Attribution(values, grid, pixels, total)
