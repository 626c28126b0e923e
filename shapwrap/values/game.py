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
from shapwrap.values.output import ShapleyOutput

Channels = Float[Tensor, "batch 1 hidden"] | None
"""A draw of dropout for each image; None for none."""

Baseline = Float[Tensor, "#batch 1 classes"] | None
"""v(0), what the head says of nobody; None where logits are a sum over patches."""


def logits_of(head: Head, features: PatchFeatures, *, training: bool) -> Logits:
    """f(x) = v(0) + sum_n phi_n (Eq. 7), from the pooled features alone."""
    pooled = head.readout.pooled(head.readout.embed(features).mean(dim=1))
    channels = head.draw_dropout(features, training=training)
    return head.classifier(pooled if channels is None else pooled * channels[:, 0])


def draw(head: Head, features: PatchFeatures, *, training: bool) -> tuple[Channels, Baseline]:
    """What both branches of a step share: one draw of dropout, and v(0) under it."""
    channels = head.draw_dropout(features, training=training)
    return channels, baseline_of(head, channels)


def baseline_of(head: Head, channels: Channels = None) -> Baseline:
    """v(0), what the head says of nobody; None where logits are a sum over patches."""
    nobody = head.readout.nobody()
    if nobody is None:
        return None
    return head.classifier(nobody[None] if channels is None else nobody[None] * channels)


def logits_and_estimates(
    head: Head,
    features: PatchFeatures,
    coalitions: Coalitions,
    channels: Channels,
    baseline: Baseline,
) -> tuple[Logits, CoalitionValues]:
    """f(x) and s . phi(x), from the features of the whole image."""
    scores = head.readout.patch_scores(head.readout.embed(features))
    everyone = coalitions.new_ones(coalitions.shape[0], 1, coalitions.shape[2])
    asked = torch.cat((everyone, coalitions), dim=1)
    sums = _in_proportion(_scores(head, present_means(scores, asked), channels), asked, baseline)
    logits = sums[:, :1] if baseline is None else sums[:, :1] + baseline
    return logits[:, 0], sums[:, 1:]


def values_of(
    head: Head,
    means: Float[Tensor, "batch coalitions features"],
    coalitions: Coalitions,
    channels: Channels,
    baseline: Baseline,
) -> CoalitionValues:
    """v(s), from masked pooled features: the sum of phi(x_s) over present patches.

    That is (|s| / N) f(x_s) where the logits are a sum over patches (Eq. 9, 10, 13), and
    f(x_s) - v(0) with a baseline.
    """
    pooled = head.readout.pooled(means.flatten(0, 1)).unflatten(0, means.shape[:2])
    scores = _scores(head, pooled, channels)
    if baseline is None:
        return _in_proportion(scores, coalitions, None)
    return torch.where(coalitions.any(dim=-1, keepdim=True), scores - baseline, 0.0)


def _scores(
    head: Head, pooled: Float[Tensor, "batch coalitions features"], channels: Channels
) -> CoalitionValues:
    return head.classifier(pooled if channels is None else pooled * channels)


def _in_proportion(
    scores: CoalitionValues, coalitions: Coalitions, baseline: Baseline
) -> CoalitionValues:
    """(|s| / N) (mean score of the present patches - v(0)); 0 for nobody."""
    gains = scores if baseline is None else scores - baseline
    present = coalitions.sum(dim=-1, keepdim=True)
    # For an empty coalition the pre-logits of a zero vector may be anything; a product with 0
    # would keep an infinite one.
    gains = torch.where(present > 0, gains, 0.0)
    return gains * (present.to(gains.dtype) / coalitions.shape[-1])


def patch_values(head: Head, features: PatchFeatures) -> PatchValues:
    """phi, [B, N, K] (Eq. 6)."""
    return class_values(head, head.readout.patch_scores(head.readout.embed(features)))


def class_values(head: Head, scores: PatchScores, *, contrast: bool = False) -> PatchValues:
    """Phi of all classes, [B, N, K]; with `contrast`, minus the mean over classes."""
    gains = head.classifier(scores)
    baseline = baseline_of(head)
    gains = gains if baseline is None else gains - baseline
    return (gains - gains.mean(dim=-1, keepdim=True) if contrast else gains) / scores.shape[1]


def target_values(
    head: Head,
    scores: PatchScores,
    target: Int[Tensor, " batch"],
    *,
    contrast: bool,
) -> Float[Tensor, "batch patches"]:
    """Phi of one class an image, [B, N]; with `contrast`, minus the mean over classes."""
    gains = head.classifier.of_target(scores, target, contrast=contrast)
    nobody = head.readout.nobody()
    if nobody is not None:
        alone = nobody[None].expand(len(scores), 1, -1)
        gains = gains - head.classifier.of_target(alone, target, contrast=contrast)
    return gains / scores.shape[1]


def spread_evenly(total: Float[Tensor, "batch classes"], coalitions: Coalitions) -> CoalitionValues:
    """(|s| / N) v(1): what an explanation without any content would predict."""
    share_of_patches = coalitions.to(total.dtype).mean(dim=-1, keepdim=True)
    return total[:, None] * share_of_patches


def total_of_pairs(
    estimates: CoalitionValues,
) -> Float[Tensor, "batch pairs classes"]:
    """v(1) = f(x) - v(0), from s . phi of complement pairs: each pair adds up to all patches."""
    return estimates[:, 0::2] + estimates[:, 1::2]


def squared_error(values: CoalitionValues, estimates: CoalitionValues) -> CoalitionValues:
    """(v(s) - s . phi)^2, in squared logits."""
    return functional.mse_loss(estimates, values, reduction="none")


def masked_logits(output: ShapleyOutput) -> CoalitionValues:
    """f(x_s) = v(s) + v(0), of complement pairs and a head that reads a class token."""
    baseline = output.logits[:, None] - total_of_pairs(output.estimates)
    return output.values + baseline.repeat_interleave(2, dim=1)
