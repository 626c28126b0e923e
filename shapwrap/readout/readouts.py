"""From patch features to patch scores whose mean is what the pretrained head would read.

A pretrained head is `classifier(pre_logits(mean of patch features))`. A readout replaces the
pooled vector by one vector z_n a patch, with mean_n z_n = pre_logits(mean_n e_n). Then
phi_n = (W z_n + b) / N sums to the pretrained logits, whatever W and b become in training. Only
the cosine readout changes what is pooled: the unit embedding of each patch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from shapwrap._types import (
    PatchEmbeddings,
    PatchFeatures,
    PatchScores,
    PooledFeatures,
    PreLogits,
)
from shapwrap.masking.pooling import compute_dtype, without_autocast

ReadoutName = Literal["affine", "shared-norm", "gap", "efficiency-gap", "class-token", "cosine"]

PreLogitFunction = Callable[[PooledFeatures], PreLogits]


class Readout(ABC):
    """How the layers between pooling and classifier are shared out among patches."""

    name: ClassVar[ReadoutName]

    _rounds: bool = False
    """Whether layers of the model, maybe in half precision, run on the result of each patch."""

    def __init__(self, pre_logits: PreLogitFunction):
        self.pre_logits = pre_logits

    def embed(self, features: PatchFeatures) -> PatchEmbeddings:
        """What is pooled: by default the features as they are, in the precision of the game."""
        return features.to(compute_dtype(features))

    def pooled(self, means: PooledFeatures) -> PreLogits:
        """Pre-logits of pooled features, as the pretrained head computes them."""
        return self.pre_logits(means)

    def nobody(self) -> PreLogits | None:
        """Pre-logits [1, D'] of an image without patches, where the head says something of it.

        None where logits are a sum over patches, which is 0 for nobody.
        """
        return None

    @abstractmethod
    def shares(self, features: PatchFeatures) -> PatchScores:
        """z, one vector a patch, up to what layers in half precision lose by rounding."""

    def patch_scores(self, features: PatchFeatures) -> PatchScores:
        """z, one vector a patch, whose mean over patches is `pooled(features.mean(1))`."""
        shares = self.shares(features)
        if not self._rounds:
            return shares
        missing = self.pooled(features.mean(dim=1)) - shares.mean(dim=1)
        return shares + missing[:, None]


class AffineReadout(Readout):
    """The layers are affine, so they commute with the mean: exact and local to each patch."""

    name = "affine"

    def __init__(self, pre_logits: PreLogitFunction, *, idle: bool = False):
        super().__init__(pre_logits)
        self._idle = idle
        self._rounds = not idle

    @override
    def pooled(self, means: PooledFeatures) -> PreLogits:
        return means if self._idle else self.pre_logits(means)

    @override
    def shares(self, features: PatchFeatures) -> PatchScores:
        if self._idle:
            return features
        return self.pre_logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])


class SharedNormReadout(Readout):
    """A normalisation after pooling: linear once its scale is known, so patches share the scale.

    z_n = gamma * (e_n - mean of e_n) / sigma + beta, with sigma that of the pooled feature; affine
    layers that follow are run on z_n.
    """

    name = "shared-norm"

    def __init__(
        self,
        pre_logits: PreLogitFunction,
        norm: Callable[[], nn.Module],
        *,
        centred: bool,
        project: PreLogitFunction | None = None,
    ):
        super().__init__(pre_logits)
        self._norm = norm
        self._centred = centred
        self._project = project
        self._rounds = project is not None

    @override
    def pooled(self, means: PooledFeatures) -> PreLogits:
        return self._scale_and_shift(means, means)

    @override
    def shares(self, features: PatchFeatures) -> PatchScores:
        return self._scale_and_shift(features, features.mean(dim=1, keepdim=True))

    def _scale_and_shift(self, features: Tensor, pooled: Tensor) -> Tensor:
        norm = self._norm()
        if self._centred:
            features = features - features.mean(dim=-1, keepdim=True)
            pooled = pooled - pooled.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(pooled.square().mean(dim=-1, keepdim=True) + _epsilon(norm, pooled))
        scores = features * scale
        if isinstance(weight := getattr(norm, "weight", None), Tensor):
            scores = scores * weight.to(scores.dtype)
        if isinstance(bias := getattr(norm, "bias", None), Tensor):
            scores = scores + bias.to(scores.dtype)
        if self._project is None:
            return scores
        return self._project(scores.flatten(0, -2)).unflatten(0, scores.shape[:-1])


class GapReadout(Readout):
    """Any layers at all: each patch alone through them, and the efficiency gap shared equally.

    z_n = h(e_n) + h(mean e) - mean_m h(e_m).
    """

    name = "gap"

    @override
    def shares(self, features: PatchFeatures) -> PatchScores:
        alone = self.pre_logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        gap = self.pooled(features.mean(dim=1))[:, None] - alone.mean(dim=1, keepdim=True)
        return alone + gap


class EfficiencyGapReadout(Readout):
    """A head that no layers on a mean describe: a layer of its own shares its output out.

    z_n = f + G e_n - mean_m G e_m, where f stands for the whole image and the linear layer G starts
    at zero: until it is trained, every patch gets the same share.
    """

    name = "efficiency-gap"

    def __init__(self, pre_logits: PreLogitFunction, own_width: int, layer: nn.Linear):
        super().__init__(pre_logits)
        self._own_width = own_width
        self._layer = layer

    @override
    def shares(self, features: PatchFeatures) -> PatchScores:
        own = features[..., : self._own_width]
        centred = own - own.mean(dim=1, keepdim=True)
        weight = self._layer.weight.to(features.dtype)
        return self.pooled(features.mean(dim=1))[:, None] + functional.linear(centred, weight)


class CosineReadout(Readout):
    """Each patch alone through the layers and to unit length, as image-text models compare.

    z_n = h(e_n) / |h(e_n)|. A linear classifier of unit vectors t_k then gives cosines, and their
    mean over patches is what stands for the image: not the cosine of its mean.
    """

    name = "cosine"

    @override
    def embed(self, features: PatchFeatures) -> PatchEmbeddings:
        with without_autocast(features):
            features = super().embed(features)
            alone = self.pre_logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            return functional.normalize(alone, dim=-1)

    @override
    def pooled(self, means: PooledFeatures) -> PreLogits:
        return means

    @override
    def shares(self, features: PatchFeatures) -> PatchScores:
        return features


def _epsilon(norm: nn.Module, like: Tensor) -> float:
    stated = getattr(norm, "eps", None)
    return torch.finfo(like.dtype).eps if stated is None else float(stated)
