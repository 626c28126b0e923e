"""AttCAT: attentive class activation tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.explainers.attention_explainer import AttentionExplainer
from shapwrap.explainers.attention_pass import AttentionPass


class AttCAT(AttentionExplainer):
    """Sum over blocks of alpha_i * sum_d (d f_c / d h_id) h_id, with the tokens h that enter.

    alpha_i is the attention that token i gets, averaged over heads and queries. Signed. What pools
    the tokens after the last block plays no part in it.

    Args:
        model: A vision transformer of global attention, wrapped or plain, or a function.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Qiang et al. 2022, "AttCAT: Explaining Transformers via Attentive Class Activation Tokens",
        NeurIPS.
    """

    name = "attcat"

    def map_of(self, seen: AttentionPass) -> Float[Tensor, "batch patches"]:
        """Each block's impact, summed."""
        impacts = [
            block.weights.mean(dim=(1, 2)) * (block.tokens * block.token_gradient).sum(dim=2)
            for block in seen.blocks
        ]
        return torch.stack(impacts).sum(dim=0)[:, seen.num_prefix :]
