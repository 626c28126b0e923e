"""ImageNet-1k and Imagenette folders, of any size, as batches for a Trainer."""

from pathlib import Path
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch.utils.data import DataLoader

from shapwrap.backbones.base import Normalization
from shapwrap.data.augmentation import IMAGENETTE, Augmentation, timm_transforms
from shapwrap.data.folder import Corrupt, FolderData, check_corrupt, evenly_spread, split_folder
from shapwrap.data.readable import ReadableOnly
from shapwrap.errors import ArgumentError
from shapwrap.wrapper import ShapleyWrapper


def imagenet(
    root: str | Path,
    wrapped: ShapleyWrapper,
    *,
    batch_size: int = 128,
    augmentation: Augmentation | None = None,
    normalization: Normalization | None = None,
    workers: int = 0,
    limit: int | None = None,
    corrupt: Corrupt | str = "raise",
) -> FolderData:
    """Batches of a folder in ImageNet-1k's layout, and the names of its classes.

    `root/train` and `root/val` hold one folder a class; where those are WordNet ids (n01440764),
    the names are words (tench). Training images are augmented by timm, in a new order each epoch,
    and those that do not fill a batch are left out; validation images as the model's pretrained
    configuration says.

    Args:
        root: Holds train/ and val/.
        wrapped: The model to train; its size and pixel statistics are used.
        batch_size: Images a batch and process.
        augmentation: Of training images; `Augmentation()` if None.
        normalization: Mean and standard deviation of the channels, where the model does not tell.
        workers: Processes that load.
        limit: At most this many training images, spread evenly over the classes.
        corrupt: What an image that cannot be read does, as in `load_folder`: "raise" or "skip".

    Raises:
        ArgumentError: Another layout, fewer images than a batch, or as many classes as the model
            does not have.
    """
    check_corrupt(corrupt)
    root = Path(root)
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise ArgumentError(
            f"{root} has no folder {' and no '.join(missing)}; expected train/ and val/ with one "
            "folder a class, of images."
        )
    transforms = timm_transforms(wrapped, augmentation, normalization=normalization)
    train, validation, folders = split_folder(root, *transforms)
    if len(folders) != wrapped.num_classes:
        raise ArgumentError(
            f"{root} has {len(folders)} classes, the model has {wrapped.num_classes}; expected as "
            f"many. Wrap with num_classes={len(folders)}."
        )
    train = evenly_spread(train, limit)
    available = len(train)  # pyright: ignore[reportArgumentType]
    if available < batch_size:
        raise ArgumentError(
            f"batch_size is {batch_size}, and {root / 'train'} gives {available} images; expected "
            "at least one batch."
        )
    if corrupt == "skip":
        train, validation = ReadableOnly(train), ReadableOnly(validation)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
    }
    return FolderData(
        DataLoader(train, shuffle=True, drop_last=True, **options),
        DataLoader(validation, **options),
        class_words(folders),
    )


def imagenette(
    root: str | Path,
    wrapped: ShapleyWrapper,
    *,
    batch_size: int = 64,
    augmentation: Augmentation | None = None,
    normalization: Normalization | None = None,
    workers: int = 0,
    limit: int | None = None,
    corrupt: Corrupt | str = "raise",
) -> FolderData:
    """Batches of Imagenette in any of its sizes, and the names of its ten classes.

    Args:
        root: The folder imagenette2, imagenette2-160 or imagenette2-320, or what holds one of them.
        wrapped: The model to train; its size and pixel statistics are used.
        batch_size: Images a batch and process.
        augmentation: Of training images; `IMAGENETTE` if None, with larger crops than ImageNet's.
        normalization: Mean and standard deviation of the channels, where the model does not tell.
        workers: Processes that load.
        limit: At most this many training images, spread evenly over the classes.
        corrupt: What an image that cannot be read does, as in `load_folder`: "raise" or "skip".

    Raises:
        ArgumentError: What `imagenet` says, or several sizes side by side.
    """
    root = Path(root)
    held = sorted(root.glob("imagenette2*/train"))
    if len(held) > 1 and not (root / "train").is_dir():
        names = ", ".join(path.parent.name for path in held)
        raise ArgumentError(f"{root} holds {names}; expected one of them: pass its own folder.")
    if held and not (root / "train").is_dir():
        root = held[0].parent
    return imagenet(
        root,
        wrapped,
        batch_size=batch_size,
        augmentation=augmentation or IMAGENETTE,
        normalization=normalization,
        workers=workers,
        limit=limit,
        corrupt=corrupt,
    )


def class_words(folders: list[str]) -> list[str]:
    """The first word for each WordNet id of ImageNet-1k; the names as they are, if one is none."""
    known = ImageNetInfo()
    ids = set(known.label_names())
    if not ids.issuperset(folders):
        return folders
    return [known.label_name_to_description(folder).split(",")[0] for folder in folders]
