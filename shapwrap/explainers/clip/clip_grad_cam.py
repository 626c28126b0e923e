"""Grad-CAM on the input of the last block, the variant of comparisons on CLIP."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.explainers.attention_explainer import AttentionExplainer
from shapwrap.explainers.attention_pass import AttentionPass


class CLIPGradCAM(AttentionExplainer):
    """ReLU(sum_d w_d F_id): F the input of the last block, w_d the mean over tokens of d f_c/d F_d.

    The mean runs over all tokens, the class token included. Another method than `GradCAM`, which
    looks after the first norm of that block, and than `AttentionGradCAM`.

    Args:
        model: A vision transformer of global attention, or a `ZeroShotClassifier` of one.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Selvaraju et al. 2017, "Grad-CAM", ICCV; on CLIP as in the comparisons of Zhao et al. 2024,
        "Gradient-based Visual Explanation for Transformer-based CLIP", ICML.
    """

    name = "grad-cam (clip)"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """The input of the last block, weighted by its mean gradient."""
        block = seen.blocks[-1]
        weights = block.token_gradient.mean(dim=1)
        patches = block.tokens[:, seen.num_prefix :]
        return torch.einsum("bd,bnd->bn", weights, patches).clamp(min=0)
