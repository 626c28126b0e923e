"""CLIP Surgery: a second path of value-value attention, and similarities without redundancy."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.clip.texts import Texts
from shapwrap.errors import ArgumentError
from shapwrap.explainers.attention_intervention import AttentionIntervention, batch_axis
from shapwrap.explainers.attention_recorder import Addition
from shapwrap.explainers.clip.clip_explainer import CLIPExplainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.explicit_attention import Attended
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.token_explainer import TokenLayout
from shapwrap.masking.pooling import without_autocast

REDUNDANCIES = ("classes", "empty prompt")
POOLING_SCALE = 8.0
"""How much sharper the value-value attention of an attention pooling is."""


class CLIPSurgery(CLIPExplainer):
    """Similarity of patches with the text, by a second path, less what they share with all texts.

    Beside the tower's own path x runs a second one that starts as the input of the first of the
    last `blocks` blocks; in each of them it adds proj(softmax(V V^T / sqrt(d)) V), V the values of
    the tower's own path, and no MLP. f_i is its patch i through final norm and projection, of unit
    length; f the image's embedding. In CLIP's ResNet the second path is the attention pooling, with
    V of unit length in place of queries and keys, and 8 / sqrt(d).

    "classes": w_c = softmax(2 f . t)_c / mean; values are w_c f_i . t_c, less their mean over all
    texts of the classifier. "empty prompt": f_i . (t_c - t_empty). Signed, without gradients.

    Args:
        model: An image-text model with its texts; with "classes" they are the list of classes.
        redundancy: "classes" or "empty prompt".
        empty: What is taken off with "empty prompt": a string, token ids [1, L], or an embedding
            [1, E]; a string needs the classifier's tokenizer.
        blocks: How many blocks have the second path; all of a tower that has fewer.
        grid: Rows and columns of patches; by default those of the tower.
        chunk_size: Images that go through the model at a time, two copies of each.

    Raises:
        ArgumentError: An unknown redundancy, "classes" with one text, not one empty prompt, or a
            number below 1.
        BackboneTypeError: No `ZeroShotClassifier`.

    References:
        Li et al. 2023, "CLIP Surgery for Better Explainability with Enhancement in Open-Vocabulary
        Tasks".
    """

    name = "clip surgery"
    copies = 2

    def __init__(
        self,
        model: Model,
        *,
        redundancy: str = "classes",
        empty: Texts = "",
        blocks: int = 6,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        check_at_least("blocks", blocks, 1)
        if redundancy not in REDUNDANCIES:
            raise ArgumentError(
                f"redundancy is {redundancy!r}; expected one of {', '.join(REDUNDANCIES)}."
            )
        self.blocks = blocks
        self.redundancy = redundancy
        self._empty: Tensor | None = None
        if redundancy == "empty prompt":
            self.name = "clip surgery (empty prompt)"
            self._empty = self.classifier.encode_texts(empty)
            if self._empty.shape != (1, self.classifier.text_embeddings.shape[1]):
                raise ArgumentError(
                    f"the empty prompt has embeddings {tuple(self._empty.shape)}; expected one, "
                    f"[1, {self.classifier.text_embeddings.shape[1]}]."
                )
        elif self.classifier.num_classes < 2:
            raise ArgumentError(
                "the classifier has one text, which shares everything with all texts; expected a "
                "list of classes, or redundancy='empty prompt'."
            )

    @torch.no_grad()
    def maps_of(
        self, images: Images, target: Int[Tensor, " batch"], layout: TokenLayout
    ) -> Float[Tensor, "batch patches"]:
        """One forward pass of two copies, one a path."""
        batch = len(images)
        reader = self.token_embeddings(images, layout)
        first = max(0, layout.last + 1 - self.blocks)

        def second_path(index: int, attended: Attended) -> Tensor:
            if index < first:
                return attended.output
            made = _value_attention(attended.values[:batch], pools=layout.pools)
            return torch.cat((attended.output[:batch], made.to(attended.output.dtype)))

        def without_mlp(index: int, number: int, addition: Addition) -> Tensor:
            if index < first or number == 0:
                return addition.result
            axis = batch_axis(addition.result, 2 * batch)
            own = addition.result.narrow(axis, 0, batch)
            return torch.cat((own, addition.shortcut.narrow(axis, batch, batch)), dim=axis)

        intervention = AttentionIntervention(attention=second_path, addition=without_mlp)
        tokens = reader.run(torch.cat((images, images)), intervention)
        image, patches = reader.image(tokens[:batch]), reader.of_patches(tokens[batch:])
        with without_autocast(images):
            return self._less_redundant(image, patches, target)

    def _less_redundant(
        self,
        image: Float[Tensor, "batch embedding"],
        patches: Float[Tensor, "batch patches embedding"],
        target: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch patches"]:
        texts = self.classifier.text_embeddings.to(image.dtype)
        if self._empty is not None:
            asked = texts[target] - self._empty.to(texts)
            return torch.einsum("bnd,bd->bn", patches, asked)
        weights = (2 * image @ texts.mT).softmax(dim=1)
        weights = weights / weights.mean(dim=1, keepdim=True)
        similarities = patches @ texts.mT * weights[:, None]
        rows = torch.arange(len(target), device=target.device)
        return similarities[rows, :, target] - similarities.mean(dim=2)


def _value_attention(
    values: Float[Tensor, "batch heads tokens width"], *, pools: bool
) -> Float[Tensor, "batch heads tokens width"]:
    """Attention whose queries and keys are the values."""
    with without_autocast(values):
        values = in_full(values)
        compared = functional.normalize(values, dim=-1) if pools else values
        scale = (POOLING_SCALE if pools else 1.0) / math.sqrt(values.shape[-1])
        return (compared @ compared.mT * scale).softmax(dim=-1) @ values
