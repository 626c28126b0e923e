"""Image files that cannot be read: refused by name, or replaced and counted."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from shapwrap.data.skipped import SkippedSampleWarning
from shapwrap.errors import ImageFileError


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in RGB, decoded.

    Raises:
        ImageFileError: It is missing, cut off, or no image.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # what broken bytes raise depends on the format
        raise ImageFileError(
            f"{Path(path)} cannot be read as an image ({type(error).__name__}: {error}); replace "
            "or delete it. Training on a folder can also skip such files: corrupt='skip'."
        ) from error


class ReadableOnly(Dataset[Any]):
    """Samples of a data set; for one whose file cannot be read, the next one that can be.

    The length stays as it is, so batches stay whole and processes in step. Which ones were left
    out is known in all processes that load, and said once for each of them.

    Args:
        samples: A data set that raises ImageFileError. What takes the place of a sample is from
            the same data set: none comes from a part that is held out.
    """

    def __init__(self, samples: Dataset[Any]):
        self.samples = samples
        total = len(samples)  # pyright: ignore[reportArgumentType]
        # Shared with the processes that load, which would forget at the end of an epoch.
        self._unreadable = torch.zeros(total, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Samples, those that cannot be read included."""
        return len(self._unreadable)

    def __getitem__(self, index: int) -> Any:
        """One sample.

        Raises:
            ImageFileError: None can be read.
        """
        total = len(self)
        if not -total <= index < total:
            raise IndexError(f"index is {index}; expected less than {total}.")
        failed: ImageFileError | None = None
        for place in range(index % total, index % total + total):
            place %= total
            if self._unreadable[place]:
                continue
            try:
                return self.samples[place]
            except ImageFileError as error:
                failed = error
                self._unreadable[place] = True
                warnings.warn(
                    f"a sample was skipped, and another taken in its place: {error}",
                    SkippedSampleWarning,
                    stacklevel=2,
                )
        raise ImageFileError(
            f"none of {total} images can be read; expected a folder of image files."
        ) from failed

    @property
    def skipped(self) -> list[int]:
        """Indices of what could not be read so far, in any process."""
        return self._unreadable.nonzero()[:, 0].tolist()
