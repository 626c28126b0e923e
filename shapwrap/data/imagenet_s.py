"""ImageNet-S: ImageNet validation images with masks of their class."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shapwrap.backbones.base import Normalization
from shapwrap.data.readable import read_image
from shapwrap.data.segmentation import HALF, SegmentationDataset
from shapwrap.errors import ArgumentError

IGNORED = 1000
"""Class id of pixels that the annotators left open."""


class ImageNetS(SegmentationDataset):
    """A folder `ImageNetS919`, `ImageNetS300` or `ImageNetS50`; see `SegmentationDataset`.

    `<split>/<wnid>/*.JPEG` are the images, `<split>-segmentation/<wnid>/*.png` the masks, whose
    class id is R + 256 G: 0 for anything else, 1000 ignored, otherwise the place, from 1, of the
    class in the sorted list of wnids. The object is the class of the image's folder; pixels of
    other classes are background.

    Args:
        root: The folder.
        split: "validation" or "train-semi".
        classes: All wnids of the set, for a folder that holds only some of them; by default the
            class folders that are there.
        image_size: Height and width in pixels.
        normalization: Mean and standard deviation of the channels, as the model was trained.

    Raises:
        ArgumentError: Folders or masks are missing, or the class ids cannot be told.

    References:
        Gao et al. 2022, "Large-scale Unsupervised Semantic Segmentation".
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "validation",
        *,
        classes: Sequence[str] | None = None,
        image_size: tuple[int, int] = (224, 224),
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] = HALF,
    ):
        super().__init__(image_size, normalization)
        images, masks = Path(root) / split, Path(root) / f"{split}-segmentation"
        for folder in (images, masks):
            if not folder.is_dir():
                raise ArgumentError(
                    f"{folder} is no folder; expected {split} and {split}-segmentation in {root}."
                )
        present = sorted(path.name for path in images.iterdir() if path.is_dir())
        self.classes = sorted(classes if classes is not None else present)
        self._check_classes(Path(root), present, given=classes is not None)
        self._items = [
            (path, masks / wnid / f"{path.stem}.png", self.classes.index(wnid) + 1)
            for wnid in present
            for path in sorted((images / wnid).iterdir())
            if path.suffix.lower() in (".jpeg", ".jpg")
        ]
        missing = [mask for _, mask, _ in self._items if not mask.is_file()]
        if missing or not self._items:
            raise ArgumentError(
                f"{root} has {len(self._items)} images and lacks {len(missing)} of their masks"
                f"{f' such as {missing[0]}' if missing else ''}; expected at least one image, and "
                "one mask each."
            )

    def _check_classes(self, root: Path, present: list[str], *, given: bool) -> None:
        named = re.search(r"ImageNetS(\d+)$", root.resolve().name)
        if not given and named and int(named.group(1)) != len(present):
            raise ArgumentError(
                f"{root} has {len(present)} class folders, not {named.group(1)}, so class ids "
                "cannot be told from them; pass classes=, all wnids of the set."
            )
        unknown = sorted(set(present) - set(self.classes))
        if unknown:
            raise ArgumentError(
                f"{root} has the class folders {unknown[:3]}, which classes= lacks; expected all "
                "wnids of the set."
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and mask in their own size.

        Raises:
            ArgumentError: A mask that is not of the image's size.
            ImageFileError: A file cannot be read.
        """
        image_path, mask_path, class_id = self._items[index]
        image = read_image(image_path)
        channels = np.array(read_image(mask_path)).astype(np.int64)
        if channels.shape[:2] != (image.height, image.width):
            raise ArgumentError(
                f"{mask_path} has shape {channels.shape[:2]}; expected that of {image_path.name}, "
                f"{(image.height, image.width)}."
            )
        ids = channels[..., 0] + 256 * channels[..., 1]
        return image, np.where(ids == IGNORED, -1, (ids == class_id).astype(np.int64))
