"""MaskCLIP: patches embedded by the values of the last attention, compared with the text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Images
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_intervention import AttentionIntervention, batch_first
from shapwrap.explainers.clip.clip_explainer import CLIPExplainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.explicit_attention import Attended
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.token_explainer import TokenLayout
from shapwrap.masking.pooling import without_autocast


class MaskCLIP(CLIPExplainer):
    """cos(z_i, t) * cos(k'_cls, k'_i): z_i patch i's embedding by the value path.

    In the last attention each token reads its own value alone; all that follows is the tower's
    own: output projection, MLP, final norm and projection. Keys k' went through the output
    projection of the attention. Signed, without gradients.

    Where the tower averages its patches, the cosine with the class token's key is the mean of those
    with all patches' keys. CLIP's ResNet is read at its attention pooling, its class token the mean
    of the map.

    Args:
        model: An image-text model with its texts.
        key_similarity: Without, the values are cos(z_i, t), as MaskCLIP was published; with it, as
            it was compared with ECLIP.
        grid: Rows and columns of patches; by default those of the tower.
        chunk_size: Images that go through the model at a time, two copies of each with
            `key_similarity`.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: No `ZeroShotClassifier`.

    References:
        Zhou, Loy & Dai 2022, "Extract Free Dense Labels from CLIP", ECCV; Zhao et al. 2024,
        "Gradient-based Visual Explanation for Transformer-based CLIP", ICML.
    """

    name = "maskclip"

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
        self.copies = 2 if key_similarity else 1
        if not key_similarity:
            self.name = "maskclip (wo-ksim)"

    @torch.no_grad()
    def maps_of(
        self, images: Images, target: Int[Tensor, " batch"], layout: TokenLayout
    ) -> Float[Tensor, "batch patches"]:
        """One forward pass of two copies, whose last attention gives v and k."""
        batch = len(images)
        reader = self.token_embeddings(images, layout)

        def values_and_keys(index: int, attended: Attended) -> Tensor:
            if index != layout.last:
                return attended.output
            if not self.key_similarity:
                return attended.values
            if attended.key is None or attended.key.shape != attended.values.shape:
                raise UnsupportedBackboneError(
                    "the keys of the last attention could not be seen, or have another shape than "
                    "its values; expected softmax(Q K^T) V with heads of one width."
                )
            return torch.cat((attended.values[:batch], attended.key[batch:]))

        intervention = AttentionIntervention(attention=values_and_keys)
        tokens = reader.run(torch.cat([images] * self.copies), intervention)[:batch]
        patches = reader.of_patches(tokens)
        with without_autocast(images):
            texts = self.classifier.text_embeddings[target].to(patches.dtype)
            values = torch.einsum("bnd,bd->bn", patches, texts)
            if not self.key_similarity:
                return values
            projected = intervention.layers[-1].projected
            if projected is None:
                raise UnsupportedBackboneError(
                    "no linear layer reads the heads of the last attention; expected an output "
                    "projection. key_similarity=False needs none."
                )
            keys = functional.normalize(in_full(batch_first(projected, 2 * batch)[batch:]), dim=-1)
            read = keys[:, reader.read].mean(dim=1)
            return values * torch.einsum("bnd,bd->bn", keys[:, reader.patches], read)
