"""Data sets of a comparison: images in [0, 1], labels and, where known, where the object is."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from shapwrap.backbones.base import Normalization
from shapwrap.comparison.config import DataConfig
from shapwrap.comparison.registry import load
from shapwrap.comparison.schema import check_keys
from shapwrap.data.digits import ClutteredDigits
from shapwrap.data.folder import evenly_spread, image_transform, split_folder
from shapwrap.errors import ArgumentError, ConfigurationError

UNTOUCHED = Normalization((0.0,) * 3, (1.0,) * 3)
"""Leaves pixels in [0, 1]."""


HELD_OUT = 10
"""One in so many training images is left out of training to hold an accuracy on."""
CONTROL_IMAGES = 400
"""At most, of those that are not trained on anyway."""
IMAGENET_CLASSES = 1000
"""What models say on images of ImageNet, whose segmentation sets have no labels of theirs."""


class Sample(NamedTuple):
    """One image, or a batch of them."""

    image: Tensor
    """Float [3, H, W] in [0, 1]."""
    label: Any
    """Index of the class."""
    mask: Tensor | None = None
    """Int64 [H, W]: 1 on the object, 0 on the background, -1 where nobody says."""


@dataclass(frozen=True)
class ComparisonData:
    """What models train on and what is explained."""

    train: Dataset[Any]
    """Pairs of an image in [0, 1], augmented, and its label."""
    evaluation: Dataset[Any]
    """`Sample`s."""
    class_names: list[str]
    masks: bool = False
    """Whether samples have masks."""
    workers: int = 0
    tested: Dataset[Any] | None = None
    """`Sample`s that accuracy is measured on; those that are explained if None."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was loaded, for the record."""
    control: Dataset[Any] | None = None
    """Pairs as in `train`, neither augmented nor among those, to hold an accuracy on."""

    def __len__(self) -> int:
        """Number of images that are explained."""
        return len(self.evaluation)  # pyright: ignore[reportArgumentType]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Sample]:
        """The images to explain, always in the same order."""
        images = self.evaluation
        if limit is not None and limit < len(self):
            images = Subset(images, range(limit))
        return self._read(images, size)

    def picked(self, places: list[int]) -> Sample:
        """Some of the images to explain, as one batch."""
        return next(iter(self._read(Subset(self.evaluation, places), len(places))))

    def test_batches(self, size: int) -> Iterator[Sample]:
        """The images that accuracy is measured on."""
        return self._read(self.evaluation if self.tested is None else self.tested, size)

    def _read(self, images: Dataset[Any], size: int) -> Iterator[Sample]:
        yield from DataLoader(
            images,
            size,
            num_workers=self.workers,
            collate_fn=_stacked,
            # Otherwise a loader moves the global random state on, although it draws nothing.
            generator=torch.Generator().manual_seed(0),
        )

    def training_batches(self, normalization: Normalization, size: int) -> DataLoader[Any]:
        """Shuffled batches of normalised images and labels."""
        return self._shuffled(self.train, normalization, size)

    def training_and_control_batches(
        self, normalization: Normalization, size: int
    ) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Batches to train on, and others to hold an accuracy on: `control`.

        Where all images of the split are for training, every tenth of them is left out of it.
        """
        train, control = self.train, self.control
        if control is None:
            indices = range(len(train))  # pyright: ignore[reportArgumentType]
            control = Subset(train, indices[::HELD_OUT])
            train = Subset(train, [index for index in indices if index % HELD_OUT])
        held = DataLoader(_Normalized(control, normalization), size, num_workers=self.workers)
        return self._shuffled(train, normalization, size), held

    def _shuffled(
        self, images: Dataset[Any], normalization: Normalization, size: int
    ) -> DataLoader[Any]:
        return DataLoader(
            _Normalized(images, normalization), size, shuffle=True, num_workers=self.workers
        )


class _Normalized(Dataset[Any]):
    """Images as one model wants them."""

    def __init__(self, images: Dataset[Any], normalization: Normalization):
        self._images = images
        self._mean, self._std = (torch.tensor(part)[:, None, None] for part in normalization)

    def __len__(self) -> int:
        return len(self._images)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index][:2]
        return (image - self._mean) / self._std, label


class _Samples(Dataset[Any]):
    """Pairs as samples without a mask."""

    def __init__(self, pairs: Dataset[Any]):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Sample:
        image, label = self._pairs[index]
        return Sample(image, label)


def _stacked(samples: list[Sample]) -> Sample:
    masks = [sample.mask for sample in samples if sample.mask is not None]
    return Sample(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([int(sample.label) for sample in samples]),
        torch.stack(masks) if masks else None,
    )


# --- kinds of data --------------------------------------------------------------------------------


class _Scenes(Dataset[Any]):
    def __init__(self, split: str, count: int, config: DataConfig, seed: int):
        size = config.image_size
        self._digits = ClutteredDigits(
            split, num_images=count, image_size=size, seed=seed, **config.options
        )

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> Sample:
        scene = self._digits.scene(index)
        mean, std = (torch.tensor(part)[:, None, None] for part in ClutteredDigits.normalization)
        return Sample((scene.image * std + mean).clamp(0, 1), scene.label, scene.evidence.long())


def digits(config: DataConfig, seed: int) -> ComparisonData:
    """The embedded digits among clutter; the digit's strokes are the object."""
    check_keys(config.options, ["distractors"], "data.options")
    train = _Scenes("train", config.train_images or 1000, config, seed)
    control = _Scenes("train", CONTROL_IMAGES, config, seed + 1)
    evaluation = _Scenes("test", config.eval_images or 200, config, seed)
    tested = None
    if config.accuracy_images is not None:
        tested = _Scenes("test", config.accuracy_images, config, seed)
    names = list(ClutteredDigits.class_names)
    return ComparisonData(train, evaluation, names, masks=True, tested=tested, control=control)


def imagenette(config: DataConfig, seed: int) -> ComparisonData:
    """Ten classes of ImageNet; `root` holds imagenette2-160."""
    from torchvision.datasets import Imagenette

    check_keys(config.options, ["size"], "data.options")
    options = {"size": "160px", **config.options}
    parts = []
    for split, augment in (("train", True), ("train", False), ("val", False)):
        transform = image_transform(config.image_size, UNTOUCHED, augment=augment)
        try:
            parts.append(Imagenette(_root(config), split=split, transform=transform, **options))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"data.root {config.root!r} cannot be read as Imagenette ({error}); expected a "
                "folder that holds imagenette2-160."
            ) from error
    names = [synonyms[0] for synonyms in parts[0].classes]
    return _of_pairs(parts[0], parts[1], parts[2], names, config)


def folder(config: DataConfig, seed: int) -> ComparisonData:
    """One folder a class, of images; with train/ and val/ or without, as `shapwrap train` reads."""
    check_keys(config.options, [], "data.options")
    augmented, plain = (
        image_transform(config.image_size, UNTOUCHED, augment=augment) for augment in (True, False)
    )
    train, validation, names = split_folder(_root(config), augmented, plain)
    unaugmented, _, _ = split_folder(_root(config), plain, plain)
    return _of_pairs(train, unaugmented, validation, names, config)


def _of_pairs(
    train: Dataset[Any],
    unaugmented: Dataset[Any],
    validation: Dataset[Any],
    names: list[str],
    config: DataConfig,
) -> ComparisonData:
    return ComparisonData(
        evenly_spread(train, config.train_images),
        _Samples(evenly_spread(validation, config.eval_images)),
        names,
        workers=config.workers,
        tested=_tested(_Samples(validation), config),
        control=_spare(unaugmented, config),
    )


class _Pets(Dataset[Any]):
    """Images stretched to the size, without a crop, so that image and trimap agree."""

    def __init__(self, root: str, split: str, config: DataConfig):
        from shapwrap.data import PetSegmentation

        try:
            self._pets = PetSegmentation(
                root, split, image_size=config.image_size, normalization=UNTOUCHED
            )
        except ArgumentError as error:
            raise ConfigurationError(
                f"data.root {config.root!r} cannot be read as Oxford-IIIT Pet: {error}"
            ) from error
        # A subset of the breeds keeps the numbers of the whole; a classifier wants 0 to K - 1.
        self.labels = sorted(set(self._pets.breeds))
        self.class_names = self._pets.class_names

    def __len__(self) -> int:
        return len(self._pets)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self._pets[index]
        return Sample(image, self.labels.index(self._pets.breeds[index]), mask)


class _Unlabelled(Dataset[Any]):
    """Images and masks of a segmentation set, without a class."""

    def __init__(self, pairs: Dataset[Any]):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Sample:
        image, mask = self._pairs[index]
        return Sample(image, -1, mask)


def imagenet_s(config: DataConfig, seed: int) -> ComparisonData:
    """ImageNet-S folders; options are those of `shapwrap.data.ImageNetS`."""
    return _segmentation("shapwrap.data:ImageNetS", config)


def imagenet_segmentation(config: DataConfig, seed: int) -> ComparisonData:
    """The file `gtsegs_ijcv.mat`; `root` is the file."""
    return _segmentation("shapwrap.data:ImageNetSegmentation", config)


def _segmentation(path: str, config: DataConfig) -> ComparisonData:
    """A set of images and masks, which nothing can be trained on."""
    given = ("root", "path", "image_size", "normalization")
    names = [n for n in inspect.signature(load(path)).parameters if n not in given]
    check_keys(config.options, names, "data.options")
    masked = load(path)(
        _root(config),
        image_size=config.image_size,
        normalization=UNTOUCHED,
        **config.options,
    )
    classes = [str(index) for index in range(IMAGENET_CLASSES)]
    return ComparisonData(
        Subset(masked, []),
        _Unlabelled(evenly_spread(masked, config.eval_images)),
        classes,
        masks=True,
        workers=config.workers,
    )


class _Mirrored(Dataset[Any]):
    """Random mirroring: what leaves a trimap's frame alone."""

    def __init__(self, samples: Dataset[Any]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        mirrored = sample.image.flip(-1) if torch.rand(()) < 0.5 else sample.image
        return Sample(mirrored, sample.label)


def pet(config: DataConfig, seed: int) -> ComparisonData:
    """Cats and dogs with trimaps; `root` holds oxford-iiit-pet; the border counts as unlabelled."""
    check_keys(config.options, [], "data.options")
    train, test = (_Pets(_root(config), split, config) for split in ("trainval", "test"))
    if train.labels != test.labels:
        raise ConfigurationError(
            f"{config.root!r} has other breeds for training than for testing; expected the same."
        )
    return ComparisonData(
        _Mirrored(evenly_spread(train, config.train_images)),
        evenly_spread(test, config.eval_images),
        train.class_names,
        masks=True,
        workers=config.workers,
        tested=_tested(test, config),
        control=_spare(train, config),
    )


def _spare(unaugmented: Dataset[Any], config: DataConfig) -> Dataset[Any] | None:
    """Images of the training split that are not trained on; None where they are few."""
    trained = evenly_spread(unaugmented, config.train_images)
    if trained is unaugmented or not isinstance(trained, Subset):
        return None
    used = set(trained.indices)
    total = len(unaugmented)  # pyright: ignore[reportArgumentType]
    spare = [index for index in range(total) if index not in used]
    if len(spare) * HELD_OUT < len(used):
        return None
    return evenly_spread(Subset(unaugmented, spare), CONTROL_IMAGES)


def _tested(samples: Dataset[Any], config: DataConfig) -> Dataset[Any] | None:
    count = config.accuracy_images
    return None if count is None else evenly_spread(samples, count)


def _root(config: DataConfig) -> str:
    if config.root is None:
        raise ConfigurationError(f"data of kind {config.kind!r} needs root, the folder it lies in.")
    return config.root
