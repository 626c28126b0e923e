"""The game: what coalitions are worth, and how the logits are shared among patches.

phi_n = (W z_n + b) / N with patch scores z (see `shapwrap.readout`), so for any coalition s
sum_{n in s} phi_n = W (sum_{n in s} z_n) / N + b |s| / N: pool first, one product after. All
classes cost no more than one, and no N x K tensor appears in training.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import (
    Coalitions,
    CoalitionValues,
    Logits,
    PatchFeatures,
    PatchScores,
    PatchValues,
)
from shapwrap.masking.pooling import present_means
from shapwrap.readout.head import Head


def logits_of(head: Head, features: PatchFeatures, *, training: bool) -> Logits:
    """f(x) = sum_n phi_n (Eq. 7), from the pooled features alone."""
    pooled = head.readout.pooled(head.readout.embed(features).mean(dim=1))
    channels = head.draw_dropout(features, training=training)
    return head.classifier(pooled if channels is None else pooled * channels[:, 0])


def logits_and_estimates(
    head: Head,
    features: PatchFeatures,
    coalitions: Coalitions,
    channels: Tensor | None,
) -> tuple[Logits, CoalitionValues]:
    """f(x) and s . phi(x), from the features of the whole image."""
    scores = head.readout.patch_scores(head.readout.embed(features))
    everyone = coalitions.new_ones(coalitions.shape[0], 1, coalitions.shape[2])
    asked = torch.cat((everyone, coalitions), dim=1)
    contributions = share(head, present_means(scores, asked), asked, channels)
    return contributions[:, 0], contributions[:, 1:]


def values_of(
    head: Head,
    means: Float[Tensor, "batch coalitions features"],
    coalitions: Coalitions,
    channels: Tensor | None,
) -> CoalitionValues:
    """v(s) = sum over present patches of phi(x_s) (Eq. 9, 10, 13), from masked pooled features."""
    pooled = head.readout.pooled(means.flatten(0, 1)).unflatten(0, means.shape[:2])
    return share(head, pooled, coalitions, channels)


def share(
    head: Head,
    pooled: Float[Tensor, "batch coalitions features"],
    coalitions: Coalitions,
    channels: Tensor | None,
) -> CoalitionValues:
    """(|s| / N) (W z + b) with z the mean score of the present patches; 0 for nobody."""
    if channels is not None:
        pooled = pooled * channels
    present = coalitions.sum(dim=-1, keepdim=True)
    # For an empty coalition the pre-logits of a zero vector may be anything; a product with 0
    # would keep an infinite one.
    scores = torch.where(present > 0, head.classifier(pooled), 0.0)
    return scores * (present.to(scores.dtype) / coalitions.shape[-1])


def patch_values(head: Head, features: PatchFeatures) -> PatchValues:
    """phi, [B, N, K] (Eq. 6)."""
    scores = head.readout.patch_scores(head.readout.embed(features))
    return head.classifier(scores) / features.shape[1]


def target_values(
    head: Head,
    scores: PatchScores,
    target: Int[Tensor, " batch"],
    *,
    contrast: bool,
) -> Float[Tensor, "batch patches"]:
    """Phi of one class an image, [B, N]; with `contrast`, minus the mean over classes."""
    return head.classifier.of_target(scores, target, contrast=contrast) / scores.shape[1]


def spread_evenly(logits: Logits, coalitions: Coalitions) -> CoalitionValues:
    """(|s| / N) f(x): what an explanation without any content would predict."""
    share_of_patches = coalitions.to(logits.dtype).mean(dim=-1, keepdim=True)
    return logits[:, None] * share_of_patches


def squared_error(values: CoalitionValues, estimates: CoalitionValues) -> CoalitionValues:
    """(v(s) - s . phi)^2, in squared logits."""
    return functional.mse_loss(estimates, values, reduction="none")
