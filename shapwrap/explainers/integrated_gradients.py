"""Integrated gradients, computed by captum."""

import torch
from jaxtyping import Int
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.baselines import Baseline, baseline_images, check_baseline
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import captum_attr, full_logits, in_full, scores

RULES = ("gausslegendre", "riemann_left", "riemann_middle", "riemann_right")
"""Captum's trapezoid is left out: its weights sum to (n_steps - 1) / n_steps."""


class IntegratedGradients(Explainer):
    """(x - x') times the mean gradient of f_c on the line from a baseline x' to x.

    A pixel has the sum over its channels, a patch the sum over its pixels, so the values of an
    image sum to f_c(x) - f_c(x'), up to the error of the integral, which more steps reduce.

    Args:
        model: A module, a wrapped model, or any differentiable function with `grid`.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Points of paths that go through the model at a time.
        n_steps: Points of each path.
        rule: Of integration, as captum names them.
        baseline: x': "zero" (grey), "black", "blur", or normalised pixels that broadcast to the
            images; see `baseline_images`.
        absolute: Sum the magnitudes of channels instead, which then sum to nothing known.

    Raises:
        ArgumentError: An option outside its range.
        BackboneTypeError: Neither a module nor a function.
        MissingDependencyError: captum is not installed.

    References:
        Sundararajan, Taly & Yan 2017, "Axiomatic Attribution for Deep Networks".
    """

    name = "integrated-gradients"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        chunk_size: int = 64,
        n_steps: int = 50,
        rule: str = "gausslegendre",
        baseline: Baseline = "zero",
        absolute: bool = False,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_at_least("n_steps", n_steps, 1)
        if rule not in RULES:
            raise ArgumentError(f"rule is {rule!r}; expected one of {', '.join(RULES)}.")
        check_baseline(baseline)
        captum_attr()
        self.n_steps, self.rule = n_steps, rule
        self.baseline, self.absolute = baseline, absolute

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Values of pixels and patches; n_steps forwards and backwards an image, and two more."""
        exact = in_full(images)
        start = baseline_images(self.baseline, exact, self.model)
        method = captum_attr().IntegratedGradients(full_logits(self.model, images.dtype))
        parts = [
            method.attribute(
                image,
                baselines=baseline,
                target=classes,
                n_steps=self.n_steps,
                method=self.rule,
                internal_batch_size=self.chunk_size,
            )
            for image, baseline, classes in zip(
                *(tensor.split(self.chunk_size) for tensor in (exact, start, target)), strict=True
            )
        ]
        made = torch.cat(parts).detach()
        if self.absolute:
            return self.of_pixels(made.abs().sum(dim=1), images)
        ends = [
            scores(self.model, end.to(images.dtype), target, self.chunk_size)
            for end in (images, start)
        ]
        return self.of_pixels(made.sum(dim=1), images, ends[0] - ends[1])
