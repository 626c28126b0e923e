"""Images with the mask of one object: what every segmentation data set here gives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError

HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""What the protocol's models are normalised with."""


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """A normalised image, float32 [3, H, W], and its mask, int64 [H, W].

    The mask is 1 on the object, 0 on the background and -1 on pixels that take no part. Image and
    mask are resized directly, without a crop: the image bilinear, the mask to the nearest pixel.

    Args:
        image_size: Height and width in pixels.
        normalization: Mean and standard deviation of the channels, as the model was trained.

    Raises:
        ArgumentError: A size that is not two positive ints, or statistics that are none.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (224, 224),
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] = HALF,
    ):
        valid = len(image_size) == 2 and all(isinstance(n, int) and n > 0 for n in image_size)
        if not valid:
            raise ArgumentError(
                f"image_size is {image_size!r}; expected two positive ints, height first."
            )
        mean, std = map(tuple, normalization)
        if {len(mean), len(std)} - {1, 3} or len(mean) != len(std) or not min(std) > 0:
            raise ArgumentError(
                f"normalization is {normalization!r}; expected (mean, std) with one number a "
                "channel each, three or one for all, standard deviations above 0."
            )
        self.image_size = image_size
        self.normalization = Normalization(mean, std)

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image in RGB and its mask [H, W] with labels 1, 0, -1, in their own size."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and mask in the size that was asked for.

        Raises:
            IndexError: Past the end, as a sequence does.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, labels = self.read(index)
        height, width = self.image_size
        pixels = transforms.normalize(
            transforms.to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)),
            list(self.normalization.mean),
            list(self.normalization.std),
        )
        # PIL has no signed bytes.
        shifted = Image.fromarray((labels + 1).astype(np.uint8))
        mask = shifted.resize((width, height), Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(mask)).long() - 1
