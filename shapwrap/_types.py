"""Tensor shapes, named once. They are checked when the tests run and cost nothing elsewhere."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
"""Normalised pixels, as the backbone expects them."""

PatchFeatures = Float[Tensor, "batch patches features"]
"""What the encoder says about each patch, before any pooling."""

PatchEmbeddings = Float[Tensor, "batch patches embedding"]
"""What is pooled: the features of each patch, or what a readout makes of them."""

PooledFeatures = Float[Tensor, "items features"]
"""One feature vector an item."""

PreLogits = Float[Tensor, "items hidden"]
"""What the classifier reads, one vector an item."""

PatchScores = Float[Tensor, "batch patches hidden"]
"""What the classifier reads, one vector a patch."""

Coalitions = Bool[Tensor, "batch coalitions patches"]
"""True where a patch is present."""

PatchMask = Bool[Tensor, "items patches"]
"""True where a patch is present, one coalition an item."""

Logits = Float[Tensor, "batch classes"]
"""Class scores."""

PatchValues = Float[Tensor, "batch patches classes"]
"""Contribution of each patch to each class, in logits."""

CoalitionValues = Float[Tensor, "batch coalitions classes"]
"""Class scores of each coalition, in logits."""

Pairing = bool | Literal["across"]
"""How coalitions are complements of each other, so that a token model runs two in one pass.

True: of one image, coalition 2i + 1 is the complement of coalition 2i. "across": coalition j of
image 2i + 1 is the complement of coalition j of image 2i; an image that is left over stands alone.
"""

Grid = tuple[int, int]
"""Rows and columns of patches."""
