"""Grad-CAM on the attention of the last block (variant A)."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.explainers.attention_explainer import AttentionExplainer
from shapwrap.explainers.attention_pass import AttentionPass


class AttentionGradCAM(AttentionExplainer):
    """ReLU(mean_h w_h a_h): a_h the last attention's row over patches, w_h its mean gradient.

    The row is that of the token which the head reads, averaged where it reads several, or the
    pooling's where the head pools by attention. Values are not scaled to [0, 1].

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Selvaraju et al. 2017, "Grad-CAM", ICCV; on attention as in the comparisons of Chefer, Gur &
        Wolf 2021, "Transformer Interpretability Beyond Attention Visualization", CVPR.
    """

    name = "grad-cam (attention)"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """Attention of the last layer, weighted by its gradient."""
        last, read = seen.blocks[-1], seen.read
        weights, gradient = last.weights, last.gradient
        if seen.pooling is not None:
            weights, gradient, read = seen.pooling
        num_patches = last.weights.shape[-1] - seen.num_prefix
        weights, gradient = weights[..., -num_patches:], gradient[..., -num_patches:]
        weighted = (weights * gradient.mean(dim=-1, keepdim=True)).mean(dim=1)
        return torch.einsum("bq,bqn->bn", read, weighted).clamp(min=0)
