"""ImageNet-Segmentation: 4,276 images with the mask of their object, one MATLAB file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shapwrap.backbones.base import Normalization
from shapwrap.data.segmentation import HALF, SegmentationDataset
from shapwrap.errors import ArgumentError, MissingDependencyError


class ImageNetSegmentation(SegmentationDataset):
    """The file `gtsegs_ijcv.mat`; see `SegmentationDataset` for what an item is.

    Its masks mark one object; its 445 classes are not those of ILSVRC. Where an image has several
    annotations the first one counts.

    Args:
        path: Of the file, MATLAB 7.3 (HDF5).
        image_size: Height and width in pixels.
        normalization: Mean and standard deviation of the channels, as the model was trained.

    Raises:
        ArgumentError: No such file, or not this format.
        MissingDependencyError: h5py is not installed.

    References:
        Guillaumin, Kuettel & Ferrari 2014, "ImageNet Auto-Annotation with Segmentation
        Propagation".
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: tuple[int, int] = (224, 224),
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] = HALF,
    ):
        super().__init__(image_size, normalization)
        self.path = Path(path)
        self._file: Any = None
        self._process = 0
        file = self._opened()
        for name in ("value/img", "value/gt"):
            if name not in file:
                raise ArgumentError(
                    f"{self.path} holds {list(file)}, not {name}; expected gtsegs_ijcv.mat."
                )
        self._length = len(file["value/img"])

    def __len__(self) -> int:
        """Number of images."""
        return self._length

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and mask in their own size.

        Raises:
            ArgumentError: A mask that is not binary, or not of the image's size.
        """
        file = self._opened()
        # MATLAB writes columns first, so HDF5 shows every axis reversed.
        pixels = np.array(file[file["value/img"][index, 0]]).T
        annotations = file[file["value/gt"][index, 0]]
        labels = np.array(file[annotations[0, 0]]).T.astype(np.int64)
        if not np.isin(labels, (0, 1)).all() or labels.shape != pixels.shape[:2]:
            raise ArgumentError(
                f"mask {index} of {self.path} has shape {labels.shape} and labels "
                f"{np.unique(labels)}; expected {pixels.shape[:2]}, 0 and 1 alone."
            )
        return Image.fromarray(pixels).convert("RGB"), labels

    def _opened(self) -> Any:
        """The file, opened anew in each process: an HDF5 handle does not survive a fork."""
        if self._file is None or self._process != os.getpid():
            self._file, self._process = _open(self.path), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _open(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            "gtsegs_ijcv.mat is HDF5; run: pip install 'shapwrap[segmentation]'"
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be read ({error}); expected gtsegs_ijcv.mat, in HDF5."
        ) from error
