"""Oxford-IIIT Pet with its trimaps as masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import OxfordIIITPet

from shapwrap.backbones.base import Normalization
from shapwrap.data.segmentation import HALF, SegmentationDataset
from shapwrap.errors import ArgumentError

LABELS = {1: 1, 2: 0, 3: -1}
"""Of a trimap: foreground, background, and the border between them, which is ignored."""


class PetSegmentation(SegmentationDataset):
    """Cats and dogs; see `SegmentationDataset` for what an item is.

    Args:
        root: The folder that holds `oxford-iiit-pet`.
        split: "test" or "trainval".
        image_size: Height and width in pixels.
        normalization: Mean and standard deviation of the channels, as the model was trained.
        download: Fetch the data if it is not there.

    Raises:
        ArgumentError: The data is not there, an unknown split, or a size that is none.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "test",
        *,
        image_size: tuple[int, int] = (224, 224),
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] = HALF,
        download: bool = False,
    ):
        super().__init__(image_size, normalization)
        if split not in ("test", "trainval"):
            raise ArgumentError(f"split is {split!r}; expected 'test' or 'trainval'.")
        try:
            self._pets = OxfordIIITPet(
                str(root), split, target_types=["category", "segmentation"], download=download
            )
        except (RuntimeError, FileNotFoundError) as error:
            raise ArgumentError(
                f"{Path(root) / 'oxford-iiit-pet'} does not hold the data set ({error}); expected "
                "folders images and annotations. Pass download=True to fetch it."
            ) from error
        self.class_names = list(self._pets.classes)
        self.breeds = list(self._pets._labels)
        """Index of each image's breed in `class_names`."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self._pets)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and mask in their own size.

        Raises:
            ArgumentError: A trimap with labels other than 1, 2 and 3.
        """
        image, (_, trimap) = self._pets[index]
        labels = np.array(trimap)
        if not np.isin(labels, list(LABELS)).all():
            raise ArgumentError(
                f"trimap {index} holds labels {np.unique(labels)}; expected 1, 2 and 3 alone."
            )
        table = np.zeros(4, dtype=np.int64)
        for label, meaning in LABELS.items():
            table[label] = meaning
        return image, table[labels]
