"""IDGI: a path's steps, each shared out by the squares of its gradient."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Grid, Images, Logits
from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.baselines import Baseline, baseline_images, check_baseline
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import in_full, scores

OUTPUTS = ("probability", "logit")


class IDGI(Explainer):
    """Sum over a path's steps of g_j^2 (f_c(x_{j+1}) - f_c(x_j)) / sum of g_j^2.

    x_0 to x_n lie evenly on the line from a baseline to the image, and g_j is the gradient of f_c
    at x_j. A step is shared out among all pixels and channels of an image, so the values sum to
    f_c(x_n) - f_c(x_0). A step that starts with a gradient of zero (0/0) goes to no pixel, and is
    missing from the sum: `efficiency_gap` tells how much that is.

    Args:
        model: A module, a wrapped model, or any differentiable function with `grid`.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Points of paths that go through the model at a time.
        n_steps: Steps of each path.
        baseline: x_0: "zero" (grey), "black", "blur", or normalised pixels that broadcast to the
            images; see `baseline_images`.
        output: f_c: softmax "probability", or "logit".

    Raises:
        ArgumentError: An option outside its range.
        BackboneTypeError: Neither a module nor a function.

    References:
        Yang, Wang & Bilgic 2023, "IDGI: A Framework to Eliminate Explanation Noise from Integrated
        Gradients".
    """

    name = "idgi"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        chunk_size: int = 64,
        n_steps: int = 50,
        baseline: Baseline = "zero",
        output: str = "probability",
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_at_least("n_steps", n_steps, 1)
        if output not in OUTPUTS:
            raise ArgumentError(f"output is {output!r}; expected 'probability' or 'logit'.")
        check_baseline(baseline)
        self.n_steps, self.baseline, self.output = n_steps, baseline, output

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Values of pixels and patches; n_steps + 1 forwards and backwards an image, and two."""
        exact = in_full(images)
        start = baseline_images(self.baseline, exact, self.model)
        ends = [
            scores(self.model, end.to(images.dtype), target, self.chunk_size, self._output)
            for end in (images, start)
        ]
        pixels = self._along_paths(start, exact, target, images.dtype)
        return self.of_pixels(pixels, images, ends[0] - ends[1])

    def _along_paths(
        self, start: Images, end: Images, target: Int[Tensor, " batch"], dtype: torch.dtype
    ) -> Float[Tensor, "batch height width"]:
        """All points of all paths in one row, path after path, in chunks that ignore borders."""
        points, device = self.n_steps + 1, end.device
        image_of = torch.arange(len(end), device=device).repeat_interleave(points)
        step_of = torch.arange(points, device=device).repeat(len(end))
        result = torch.zeros_like(end[:, 0])
        shares, value = end.new_zeros(0, *end.shape[2:]), end.new_zeros(0)
        for first in range(0, len(step_of), self.chunk_size):
            chunk = slice(first, first + self.chunk_size)
            along = step_of[chunk].to(end) / self.n_steps
            x = torch.lerp(start[image_of[chunk]], end[image_of[chunk]], along[:, None, None, None])
            made, its_value = self._point(x.to(dtype), target[image_of[chunk]])
            # The last point of a chunk waits for the first of the next.
            earlier = slice(first - len(value), first + len(its_value) - 1)
            shares, value = torch.cat((shares, made)), torch.cat((value, its_value))
            # From the end of one path to the start of the next there is no step.
            gains = (value[1:] - value[:-1]) * (step_of[earlier] < self.n_steps)
            result.index_add_(0, image_of[earlier], shares[:-1] * gains[:, None, None])
            shares, value = shares[-1:], value[-1:]
        return result

    def _point(self, x: Images, target: Int[Tensor, " points"]) -> tuple[Tensor, Tensor]:
        """Squared gradients as shares of their sum, [P, H, W], and f_c, [P]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._output(in_full(self.model.logits(x))).gather(1, target[:, None])[:, 0]
            gradient = in_full(torch.autograd.grad(value.sum(), x)[0])
        # Squares of a saturated softmax's gradients would underflow.
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        squares = torch.where(largest == 0, 0.0, gradient / largest).square().sum(dim=1)
        whole = squares.sum(dim=(1, 2), keepdim=True)
        return torch.where(whole == 0, 0.0, squares / whole), value.detach()

    def _output(self, logits: Logits) -> Logits:
        return logits.softmax(dim=1) if self.output == "probability" else logits
