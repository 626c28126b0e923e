"""What the interface of explainers asks about a B-cosified tower and its texts."""

from functools import cached_property

import torch
from torch import Tensor

from shapwrap._types import Grid, Images, Logits
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ImageError
from shapwrap.explainers.bcosified.similarity import BcosifiedSimilarity
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.trained.surrogate import precision_of
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import FAILURES


class ExplainedTower(ExplainedModel):
    """Images to similarities with texts; its patches are the places of the tower's last map.

    Args:
        similarity: Of images and texts.
        grid: Rows and columns of patches that values are given for; by default the tower's own.
    """

    def __init__(self, similarity: BcosifiedSimilarity, *, grid: Grid | None = None):
        super().__init__(similarity, grid=grid)
        self.similarity = similarity

    def cast(self, images: Tensor) -> Tensor:
        """In the tower's precision, which is float32 for an original in half precision."""
        return images.to(precision_of(self.similarity))

    def logits(self, images: Images) -> Logits:
        """Similarities with each text, [B, T]; as what contributes to them, not in autocast."""
        with without_autocast(images):
            return super().logits(self.cast(images))

    def check(self, images: Tensor) -> None:
        """Raise unless the images can be explained.

        Raises:
            ImageTypeError: Not a floating-point tensor.
            ImageError: Wrong shape or channels, pixels that are not finite, or an image too small.
        """
        floating = isinstance(images, Tensor) and images.is_floating_point()
        super().check(self.cast(images) if floating else images)
        self.native_grid(images)

    def native_grid(self, images: Images) -> Grid:
        """Rows and columns of the tower's last map for images of this size.

        Raises:
            ImageError: Nothing is left of an image so small, or of so many channels.
        """
        size = (images.shape[-2], images.shape[-1])
        expected = self.similarity.tower.body.conv1.in_channels // 2
        if images.shape[1] != expected:
            raise ImageError(
                f"images have {images.shape[1]} channels; this tower was built for {expected}."
            )
        if size not in self._native:
            self._native[size] = self._measured(images)
        return self._native[size]

    def covered(self, images: Images) -> tuple[int, int] | None:
        """None: the patches lie over the image."""
        return None

    @cached_property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation of the channels, as given or as the tower stated."""
        return self.similarity.tower.normalization

    @torch.no_grad()
    def _measured(self, images: Images) -> Grid:
        tower = self.similarity.tower
        with evaluation_mode(tower.modules()):
            try:
                rows, columns = tower.features(tower.encode(self.cast(images[:1]))).shape[-2:]
            except FAILURES as error:
                raise ImageError(
                    f"the tower refuses images of {images.shape[-2]} x {images.shape[-1]} pixels "
                    f"({error}); it was built for {tower.image_size}. Resize the images."
                ) from error
        return int(rows), int(columns)
