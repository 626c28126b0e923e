"""The linear map that a B-cosified tower applies to an image, for one text."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Images
from shapwrap.backbones.base import Normalization
from shapwrap.explainers.bcosified.dynamic import explanation_mode
from shapwrap.explainers.bcosified.similarity import BcosifiedSimilarity
from shapwrap.explainers.bcosified.tower import Encoded
from shapwrap.masking.pooling import without_autocast


class LinearSummary(NamedTuple):
    """`score` = sum of `weights * encoded`, exactly, for each image."""

    encoded: Encoded
    """X, the images in six channels as the first convolution reads them."""
    weights: Encoded
    """W(x), the dynamic weights."""
    score: Float[Tensor, " batch"]
    """The similarity with the text asked for."""

    def contributions(self) -> Float[Tensor, "batch height width"]:
        """What each pixel contributes: the sum over channels of x * W(x)."""
        return (self.encoded * self.weights).sum(dim=1)

    def pixel_contributions(
        self, normalization: Normalization
    ) -> Float[Tensor, "batch height width"]:
        """The same for [x, 1 - x] with x in 0 ... 1, as the authors' code has it.

        They sum to the score and what the normalisation of these channels takes off, a bias.
        """
        mean = self.encoded.new_tensor(normalization.mean)
        std = self.encoded.new_tensor(normalization.std)
        means, stds = torch.cat((mean, 1 - mean)), torch.cat((std, std))
        shown = self.encoded + (means / stds)[:, None, None]
        return (shown * self.weights).sum(dim=1)


def linear_summary(
    similarity: BcosifiedSimilarity, images: Images, target: Int[Tensor, " batch"]
) -> LinearSummary:
    """W(x) of each image for one text each, from one forward and one backward pass.

    Exact in eval mode, out of autocast. Gradients of the parameters are neither made nor moved.

    Args:
        similarity: Of images and texts.
        images: As the tower takes them.
        target: Index of the text of each image.
    """
    with torch.enable_grad(), explanation_mode(similarity), without_autocast(images):
        encoded = similarity.tower.encode(images).detach().requires_grad_()
        scores = similarity.of_encoded(encoded).gather(1, target[:, None])[:, 0]
        (weights,) = torch.autograd.grad(scores.sum(), encoded)
    return LinearSummary(encoded.detach(), weights, scores.detach())
