"""The surrogate of a ViT: absent patches are no keys in any block, the class token stays."""

import torch
from einops import rearrange
from torch import nn

from shapwrap._types import Coalitions, CoalitionValues, Images, Logits, PooledFeatures
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.choosing import Request
from shapwrap.errors import MaskingError, ShapwrapError, UnsupportedBackboneError
from shapwrap.explainers.trained.surrogate import Surrogate, own_copy
from shapwrap.probing import FAILURES, random_images, undisturbed
from shapwrap.wrapping import wrap

TOLERANCE = 1e-3
"""Largest difference from the model's logits on whole images, as a share of their size."""


class TokenSurrogate(Surrogate):
    """A copy of a token model whose absent patches are removed before the first block.

    Attention logits of absent keys are minus infinity ("pre-softmax" masking of ViT-Shapley), which
    is the same; class and register tokens are always there. A coalition and its complement take
    one pass, each with prefix tokens of its own. A head that averages patches averages those that
    are present.

    Args:
        model: The plain model; copied.
        image_size: Height and width of the images.

    Raises:
        UnsupportedBackboneError: Not a token model, or one whose head reads its tokens in a way
            that cannot be masked.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]):
        super().__init__()
        self.model = own_copy(model)
        request = Request(masking="token-removal", prefix_tokens="keep", image_size=image_size)
        try:
            wrapping = wrap(self.model, request, None)[0]
        except MaskingError as error:
            raise UnsupportedBackboneError(
                f"patches of {type(model).__name__} cannot be removed before its first block "
                f"({error}); ViT-Shapley needs that. Use FastSHAP, which masks pixels."
            ) from error
        backbone = wrapping.backbone
        if not isinstance(backbone, TokenBackbone):
            raise UnsupportedBackboneError(
                f"{type(model).__name__} is no token model; ViT-Shapley needs one. Use FastSHAP."
            )
        # The class token sees the patches, as in the model; the wrapper would drop it.
        backbone.prefix_tokens = "keep"
        self.backbone = backbone
        self.grid = wrapping.grid
        noise = random_images(backbone, image_size, batch=2)
        with undisturbed(self.model):
            self.reads_patches = not backbone.ignores_patches(noise)
            self._check_whole_images(noise)

    def forward(
        self, images: Images, coalitions: Coalitions, *, paired: bool = False
    ) -> CoalitionValues:
        """Logits of each coalition, [B, S, K]."""
        if self.reads_patches:
            means = self.backbone.present_means(images, coalitions, paired=paired)
            return self._scores(means.flatten(0, 1)).unflatten(0, means.shape[:2])
        run = coalitions[:, 0::2] if paired else coalitions
        tokens, _, num_prefix = self.backbone.removed_tokens(images, run, paired=paired)
        prefix = rearrange(
            tokens[:, :num_prefix],
            "items (parts t) d -> (items parts) t d",
            parts=2 if paired else 1,
        )
        scores = self.backbone.prefix_scores(prefix)
        return rearrange(scores, "(b s) k -> b s k", b=len(images))

    def ends(self, images: Images, *, chunk_size: int) -> tuple[Logits, Logits]:
        """Logits of the empty and of the full coalition, [B, K] each; they are a pair."""
        shape = (len(images), 1, self.grid[0] * self.grid[1])
        everyone = torch.ones(shape, dtype=torch.bool, device=images.device)
        pair = torch.cat((everyone, ~everyone), dim=1)
        logits = self.evaluate(images, pair, paired=True, chunk_size=chunk_size)
        return logits[:, 1], logits[:, 0]

    def _scores(self, pooled: PooledFeatures) -> Logits:
        """The model's head on a mean over patches, attention-weighted where its pooling is."""
        classifiers = self.backbone.classifiers()
        if not classifiers:
            return self.backbone.class_scores(pooled)
        hidden = self.backbone.pre_logits(pooled)
        return torch.stack([classifier(hidden) for classifier in classifiers]).mean(dim=0)

    def _check_whole_images(self, images: Images) -> None:
        """Raise unless nothing changes where every patch is present.

        Raises:
            UnsupportedBackboneError: It does.
        """
        name = type(self.model).__name__
        shape = (len(images), 1, self.grid[0] * self.grid[1])
        everyone = torch.ones(shape, dtype=torch.bool, device=images.device)
        expected = self.backbone.original(images)[1]
        try:
            found = self(images, everyone)[:, 0]
        except FAILURES as error:
            if isinstance(error, ShapwrapError):
                raise
            raise UnsupportedBackboneError(
                f"the head of {name} cannot be run on the tokens of a coalition ({error}); "
                "ViT-Shapley needs that. Use FastSHAP, which masks pixels."
            ) from error
        same_shape = found.shape == expected.shape
        if not same_shape or (found - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise UnsupportedBackboneError(
                f"with all patches present, the surrogate of {name} differs from the model: its "
                "head reads more than the class token or the mean of the patches. Use FastSHAP, "
                "which masks pixels."
            )
