"""Models whose head reads its patches in no way that could be shared out: their output is kept."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapwrap._types import Images, PatchFeatures, PooledFeatures, PreLogits
from shapwrap.backbones.base import Backbone, FeatureMap


class WholeModel(Backbone):
    """A backbone that runs as one piece; each patch carries what the whole image amounts to.

    The features of a patch are its own, followed by `shared_width` numbers that all patches of an
    image have in common: what the classifier reads, or the class scores where there is no single
    linear classifier. Their mean over any patches is exact, and the efficiency-gap readout shares
    it out.
    """

    shared_width: int = 0

    @abstractmethod
    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """Features of the patches [B, N, D], and [B, D'] that stands for the whole image."""

    def features(self, images: Images) -> FeatureMap:
        """Features of each patch, followed by those of the whole image."""
        (features, grid), output = self.map_and_output(images)
        self.shared_width = output.shape[1]
        shared = output[:, None].expand(-1, features.shape[1], -1)
        # Half-precision features must not round the logits.
        dtype = torch.promote_types(features.dtype, output.dtype)
        return FeatureMap(torch.cat((features.to(dtype), shared.to(dtype)), dim=2), grid)

    def own_width(self, features: PatchFeatures | PooledFeatures) -> int:
        """D, how many of the numbers are the patch's own."""
        return features.shape[-1] - self.shared_width

    def pre_logits(self, pooled: PooledFeatures) -> PreLogits:
        """The part that stands for the whole image."""
        return pooled[:, self.own_width(pooled) :]

    def class_scores(self, pooled: PooledFeatures) -> Tensor:
        """The same part: without a linear classifier it holds the class scores."""
        return self.pre_logits(pooled)


def main_output(output: Any) -> Any:
    """Logits of a model that returns more: the field or key `logits`, else the first of several."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) and output else output


def mean_output(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Logits of a timm model; a distilled one returns two in train mode, averaged in eval."""
    return output if isinstance(output, Tensor) else torch.stack(list(output)).mean(dim=0)
