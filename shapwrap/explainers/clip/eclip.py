"""ECLIP (Grad-ECLIP): values of the last attention, weighted by gradient and by similarity."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Images
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_intervention import AttentionIntervention, batch_first
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.explicit_attention import Attended
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.token_explainer import TokenExplainer, TokenLayout
from shapwrap.masking.pooling import without_autocast


class ECLIP(TokenExplainer):
    """ReLU(sum_r lam_ri sum_d w_rd v_id), r the tokens that the output reads, i the patches.

    The last attention runs with one head: o = softmax(sum_h S_h / sqrt(H)) V, S the scores of its
    H heads and V their values side by side, which is softmax(Q K^T / sqrt(D)) V. w_rd is the
    gradient of the logit with respect to o_rd, and lam_ri the cosine of q'_r and k'_i, brought to
    [0, 1] over the patches; q' and k' went through the output projection as o does (and through a
    norm before it, where there is one). Patches that are all alike in it get lam = 1.

    Published for the class token, whose gradient is the only one in such a tower. Where the output
    reads several tokens (average, attention pooling), each has its own gradient and the sum is
    taken over them.

    Args:
        model: A vision transformer of global attention, a model whose feature map is pooled by
            self-attention (CLIP's ResNet), or a `ZeroShotClassifier` of one.
        key_similarity: Without, lam = 1 ("wo-ksim").
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Images that go through the model at a time, three copies of each with
            `key_similarity`.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: Neither a module nor a function.

    References:
        Zhao et al. 2024, "Gradient-based Visual Explanation for Transformer-based CLIP", ICML.
    """

    name = "eclip"

    def __init__(
        self,
        model: Model,
        *,
        key_similarity: bool = True,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        self.key_similarity = key_similarity
        self.copies = 3 if key_similarity else 1
        if not key_similarity:
            self.name = "eclip (wo-ksim)"

    def maps_of(
        self, images: Images, target: Int[Tensor, " batch"], layout: TokenLayout
    ) -> Float[Tensor, "batch patches"]:
        """One forward pass of copies whose last attention gives o, q and k, one backward."""
        batch, seen = len(images), _LastAttention(layout.last, len(images))
        intervention = AttentionIntervention(attention=seen)
        with torch.no_grad():
            with intervention:
                logits = self.model.logits(torch.cat([images] * self.copies))
            # The rule turned gradients on where they begin, at the last attention.
            output = seen.output
            score = logits[:batch].gather(1, target[:, None]).sum()
        if output is None or not score.requires_grad:
            raise UnsupportedBackboneError(
                "the gradient of the logit does not reach the last attention; expected a forward "
                "pass without torch.no_grad and detach after it."
            )
        (gradient,) = torch.autograd.grad(score, output)
        with without_autocast(images):
            patches = slice(layout.num_prefix, None)
            shares = gradient @ seen.values[:, patches].mT
            if self.key_similarity:
                projected = intervention.layers[-1].projected
                shares = shares * _key_similarity(projected, batch, patches)
            return shares.sum(dim=1).clamp(min=0)


class _LastAttention:
    """The rule: one head for the first copy of the images, queries and keys for the others."""

    def __init__(self, last: int, batch: int):
        self.last = last
        self.batch = batch
        self.output: Float[Tensor, "batch tokens features"] | None = None
        self.values: Tensor = torch.empty(0)

    def __call__(self, index: int, attended: Attended) -> Tensor:
        if index != self.last:
            return attended.output
        query, key = attended.query, attended.key
        if query is None or key is None or query.shape != attended.values.shape:
            raise UnsupportedBackboneError(
                "the queries and keys of the last attention could not be seen, or have another "
                "shape than its values; expected softmax(Q K^T) V with heads of one width."
            )
        batch, heads = self.batch, query.shape[1]
        with torch.no_grad(), without_autocast(query):
            weights = (in_full(attended.scores[:batch]).sum(dim=1) / math.sqrt(heads)).softmax(-1)
            self.values = rearrange(in_full(attended.values[:batch]), "b h t d -> b t (h d)")
            output = weights @ self.values
        self.output = output.requires_grad_()
        torch.set_grad_enabled(True)
        one_head = rearrange(output, "b t (h d) -> b h t d", h=heads).to(query.dtype)
        # Empty where there are no such copies.
        return torch.cat((one_head, query[batch : 2 * batch], key[2 * batch :]))


def _key_similarity(
    projected: Tensor | None, batch: int, patches: slice
) -> Float[Tensor, "batch queries patches"]:
    if projected is None:
        raise UnsupportedBackboneError(
            "no linear layer reads the heads of the last attention; expected an output projection. "
            "key_similarity=False needs none."
        )
    tokens = functional.normalize(batch_first(in_full(projected.detach()), 3 * batch), dim=-1)
    queries, keys = tokens[batch : 2 * batch], tokens[2 * batch :, patches]
    cosines = queries @ keys.mT
    low, high = cosines.amin(dim=2, keepdim=True), cosines.amax(dim=2, keepdim=True)
    flat = high == low
    return torch.where(flat, 1.0, (cosines - low) / (high - low + flat))
