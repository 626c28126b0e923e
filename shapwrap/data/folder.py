"""Labelled image folders: one folder a class, as torchvision's ImageFolder reads them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from shapwrap.backbones.base import Normalization
from shapwrap.data.readable import ReadableOnly, read_image
from shapwrap.errors import ArgumentError

VALIDATION_NAMES = ("val", "valid", "validation", "test")
Corrupt = Literal["raise", "skip"]


class FolderData(NamedTuple):
    """Batches for a Trainer."""

    train: DataLoader
    validation: DataLoader
    class_names: list[str]

    @property
    def skipped(self) -> int:
        """Images that could not be read so far; only counted with `corrupt="skip"`."""
        parts = (self.train.dataset, self.validation.dataset)
        return sum(len(part.skipped) for part in parts if isinstance(part, ReadableOnly))


def image_transform(
    size: tuple[int, int], normalization: Normalization, *, augment: bool
) -> transforms.Compose:
    """From a PIL image to a normalised tensor [3, H, W].

    Args:
        size: Height and width.
        normalization: Mean and standard deviation of the channels.
        augment: Random crops and mirroring; otherwise the whole centre.
    """
    if augment:
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.35, 1.0)),
            transforms.RandomHorizontalFlip(),
        ]
    else:
        longest = max(size)
        steps = [transforms.Resize(longest), transforms.CenterCrop(size)]
    return transforms.Compose(
        [
            transforms.Lambda(_to_rgb),
            *steps,
            transforms.ToTensor(),
            transforms.Normalize(normalization.mean, normalization.std),
        ]
    )


def _to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def load_folder(
    folder: str | Path,
    size: tuple[int, int],
    normalization: Normalization,
    *,
    batch_size: int = 32,
    workers: int = 0,
    limit: int | None = None,
    corrupt: Corrupt | str = "raise",
) -> FolderData:
    """Training and validation batches of a folder.

    `folder/train` and `folder/val` (or valid, validation, test) where they exist; otherwise every
    fifth image of `folder` validates.

    Args:
        folder: One folder a class, of images.
        size: Height and width in pixels.
        normalization: Of the pretrained weights.
        batch_size: Images a batch.
        workers: Processes that load.
        limit: At most this many training images, spread evenly over the folder's order.
        corrupt: What an image that cannot be read does: "raise" ends training with an
            ImageFileError that names the file; "skip" takes the next image of the same part in its
            place, with a SkippedSampleWarning, and `skipped` of the result counts it.

    Raises:
        ArgumentError: There are no images where they are expected, or another word for `corrupt`.
    """
    check_corrupt(corrupt)
    augmented = image_transform(size, normalization, augment=True)
    plain = image_transform(size, normalization, augment=False)
    train, validation, class_names = split_folder(folder, augmented, plain)
    if limit is not None:
        train = evenly_spread(train, limit)
    if corrupt == "skip":
        train, validation = ReadableOnly(train), ReadableOnly(validation)
    return FolderData(
        DataLoader(train, batch_size=batch_size, shuffle=True, num_workers=workers),
        DataLoader(validation, batch_size=batch_size, num_workers=workers),
        class_names,
    )


def check_corrupt(corrupt: str) -> None:
    """Raise for another word than those of `load_folder`.

    Raises:
        ArgumentError: It is one.
    """
    if corrupt not in get_args(Corrupt):
        raise ArgumentError(f"corrupt is {corrupt!r}; expected one of {get_args(Corrupt)}.")


def split_folder(
    folder: str | Path, augmented: transforms.Compose, plain: transforms.Compose
) -> tuple[Dataset[Any], Dataset[Any], list[str]]:
    """Training images, validation images and class names; see `load_folder`.

    Args:
        folder: One folder a class, of images.
        augmented: Transform of training images.
        plain: Transform of validation images.

    Raises:
        ArgumentError: There are no images where they are expected.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArgumentError(f"{root} is no folder; expected one folder a class, of images.")
    held_out = [root / name for name in VALIDATION_NAMES if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held_out:
        train = _open(root, augmented)
        kept = [index for index in range(len(train)) if index % 5]
        return (
            Subset(train, kept),
            Subset(_open(root, plain), range(0, len(train), 5)),
            train.classes,
        )
    train = _open(root / "train", augmented)
    validation = _open(held_out[0], plain)
    if train.classes != validation.classes:
        raise ArgumentError(
            f"{root / 'train'} has the classes {train.classes}, {held_out[0]} has "
            f"{validation.classes}; expected the same."
        )
    return train, validation, train.classes


def evenly_spread(images: Dataset[Any], limit: int | None) -> Dataset[Any]:
    """At most `limit` images, spread over the order of the whole, which is often by class."""
    total = len(images)  # pyright: ignore[reportArgumentType]
    if limit is None or limit >= total:
        return images
    return Subset(images, [index * total // limit for index in range(limit)])


def _open(folder: Path, transform: transforms.Compose) -> ImageFolder:
    try:
        return ImageFolder(str(folder), transform, loader=read_image)
    except FileNotFoundError as error:
        raise ArgumentError(
            f"{folder} has no usable images ({error}); expected one folder a class, of images."
        ) from error
