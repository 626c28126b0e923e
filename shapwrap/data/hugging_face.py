"""Images with labels from Hugging Face data sets, in memory or streamed."""

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from shapwrap.arguments import check_at_least
from shapwrap.data.image_text_sample import Transform, stacked, transformed
from shapwrap.data.seeded import seeded
from shapwrap.errors import ArgumentError, MissingDependencyError, TrainingError


class HuggingFaceImages(Dataset[tuple[Tensor, int]]):
    """Images and labels of a `datasets.Dataset`, for a DataLoader.

    Args:
        dataset: With a length and an index, as `load_dataset` returns it without `streaming`.
        transform: From a PIL image in RGB to a float tensor.
        image: Name of the column of images: PIL images, arrays [H, W, 3] of bytes, or files.
        label: Name of the column of class indices.

    Raises:
        ArgumentError: A data set of another kind (a dictionary of splits, a stream), or without
            these columns.
    """

    def __init__(
        self, dataset: Any, transform: Transform, *, image: str = "image", label: str = "label"
    ):
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ArgumentError(
                f"dataset is {type(dataset).__name__}; expected a datasets.Dataset with a length. "
                "For a stream use HuggingFaceStream."
            )
        _check_columns(dataset, image, label)
        self.class_names = _names_of(dataset, label)
        self._dataset, self._transform = dataset, transform
        self._columns = image, label

    def __len__(self) -> int:
        """Number of images."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image, transformed, and label.

        Raises:
            ArgumentError: No image, no class index, or a transform that gives no tensor.
        """
        sample, (image, label) = self._dataset[index], self._columns
        key = f"{image} {index}"
        return transformed(_picture(sample[image], key), self._transform, key), _index(
            sample[label], f"{label} {index}"
        )


class HuggingFaceStream:
    """Batches (images [B, C, H, W], labels int64 [B]) of a `datasets.IterableDataset`.

    An iteration is one epoch, in an order of its own. Order and whatever a transform draws depend
    on seed, epoch and place alone: a resumed run reads past what was given without decoding it and
    goes on bit for bit. Images are decoded in the training process; many images are faster as a
    `HuggingFaceImages` in a DataLoader with workers.

    Processes share the stream, by its shards where their number divides; one that comes to its end
    before the epoch does starts its share again, so that all give as many batches.

    Args:
        dataset: As `load_dataset(..., streaming=True)` returns it.
        transform: From a PIL image in RGB to a float tensor, all of one shape.
        batch_size: Images a batch and process.
        num_samples: Images in an epoch, over all processes; by default what the data set states of
            itself. What does not fill a batch of each process is left out.
        image: Name of the column of images.
        label: Name of the column of class indices.
        shuffle: Mix shards, and images in the buffer.
        buffer_size: Images that are mixed.
        seed: Of order and transforms.

    Raises:
        ArgumentError: No stream, no such columns, an unknown number of samples, or fewer than a
            batch.
        MissingDependencyError: datasets is not installed.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        *,
        batch_size: int = 64,
        num_samples: int | None = None,
        image: str = "image",
        label: str = "label",
        shuffle: bool = True,
        buffer_size: int = 1000,
        seed: int = 0,
    ):
        library = _library()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("buffer_size", buffer_size, 1)
        if not isinstance(dataset, library.IterableDataset):
            raise ArgumentError(
                f"dataset is {type(dataset).__name__}; expected a datasets.IterableDataset, such "
                "as load_dataset(..., streaming=True, split=...). For a data set with a length "
                "use HuggingFaceImages."
            )
        _check_columns(dataset, image, label)
        self.num_samples = _stated_samples(dataset) if num_samples is None else num_samples
        check_at_least("num_samples", self.num_samples, 1)
        self.class_names = _names_of(dataset, label)
        if dataset.features is not None and isinstance(dataset.features[image], library.Image):
            # What a resumed run reads past must not be decoded.
            dataset = dataset.cast_column(image, library.Image(decode=False))
        if shuffle:
            dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self._stream, self._decoder = dataset, library.Image()
        self._transform, self._batch_size = transform, batch_size
        self._columns = image, label
        self._order = {"shuffle": shuffle, "buffer_size": buffer_size, "seed": seed}
        self._process, self._processes = 0, 1
        self._epoch, self._batch, self._round, self._read = 0, 0, 0, 0
        self._check_length()

    def __len__(self) -> int:
        """Batches of one process in a whole epoch."""
        return self.num_samples // (self._batch_size * self._processes)

    def split(self, process_index: int, num_processes: int) -> "HuggingFaceStream":
        """A copy with the share of one process; the trainers call it.

        Raises:
            ArgumentError: Fewer samples than a batch for each process.
        """
        part = copy.copy(self)
        part._process, part._processes = process_index, num_processes
        part._check_length()
        return part

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its start."""
        self._epoch, self._batch, self._round, self._read = epoch, 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: after the last batch that it gave."""
        place = [self._epoch, self._batch, self._round, self._read]
        return {"place": place, "depends_on": self._what_order_depends_on()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on there, with what is left of the epoch.

        Raises:
            TrainingError: Another order, number of samples or of processes.
        """
        self._check_same(state, set())
        self._epoch, self._batch, self._round, self._read = state["place"]

    def take_over(self, states: Sequence[dict[str, Any]]) -> None:
        """Check that another number of processes had this stream; nothing outlasts an epoch.

        Raises:
            TrainingError: Another order or number of samples.
        """
        for state in states:
            self._check_same(state, {"batch_size", "process"})

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels.

        Raises:
            ArgumentError: No image, no class index, or a transform that gives no tensor.
            TrainingError: The stream gives nothing.
        """
        if self._batch >= len(self):
            self.set_epoch(self._epoch + 1)
        samples = self._samples()
        while self._batch < len(self):
            made = [next(samples) for _ in range(self._batch_size)]
            self._batch += 1
            last = made[-1]
            self._round, self._read = last[2:]
            yield stacked([item[0] for item in made]), torch.tensor([item[1] for item in made])
        self.set_epoch(self._epoch + 1)

    def _samples(self) -> Iterator[tuple[Tensor, int, int, int]]:
        """Image, label, round and samples read in it, from the place on."""
        image, label = self._columns
        for again in itertools.count(self._round):
            skip = self._read if again == self._round else 0
            read = 0
            for sample in self._share():
                read += 1
                if read <= skip:
                    continue
                key = f"{self._order['seed']} {self._epoch} {self._process} {again} {read}"
                given = sample[image]
                if isinstance(given, Mapping):
                    given = self._decoder.decode_example(dict(given))
                with seeded(random.Random(key).getrandbits(63)):
                    made = transformed(_picture(given, key), self._transform, key)
                yield made, _index(sample[label], key), again, read
            if not read:
                raise TrainingError(
                    f"the stream has no sample for process {self._process} of {self._processes}; "
                    f"expected {self.num_samples} in all. Use more shards, or fewer processes."
                )

    def _share(self) -> Any:
        stream = self._stream
        if self._processes > 1:
            from datasets.distributed import split_dataset_by_node

            stream = split_dataset_by_node(stream, self._process, self._processes)
        stream.set_epoch(self._epoch)
        return stream

    def _check_same(self, state: dict[str, Any], free: set[str]) -> None:
        now, before = self._what_order_depends_on(), state["depends_on"]
        changed = {
            name: (before.get(name), value)
            for name, value in now.items()
            if name not in free and before.get(name) != value
        }
        if changed:
            raise TrainingError(
                f"the stream changed (before, now): {changed}; resume with the same data set and "
                "settings, or start anew elsewhere."
            )

    def _check_length(self) -> None:
        if len(self) == 0:
            raise ArgumentError(
                f"num_samples is {self.num_samples}; expected at least {self._batch_size} for "
                f"each of {self._processes} processes, one batch."
            )

    def _what_order_depends_on(self) -> dict[str, Any]:
        sizes = {"num_samples": self.num_samples, "batch_size": self._batch_size}
        return {**self._order, **sizes, "process": [self._process, self._processes]}


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "streams are read by datasets; install it with pip install 'shapwrap[datasets]'."
        ) from error
    return datasets


def _check_columns(dataset: Any, image: str, label: str) -> None:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, Mapping):
        raise ArgumentError(
            f"dataset holds the splits {list(columns)}; expected one of them, such as "
            "dataset['train']."
        )
    missing = [name for name in (image, label) if columns is not None and name not in columns]
    if missing:
        raise ArgumentError(
            f"dataset has no column {' and no '.join(missing)} but {list(columns or [])}; pass the "
            "names of yours as image= and label=."
        )


def _names_of(dataset: Any, label: str) -> list[str] | None:
    """Names of the classes, where the data set tells."""
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(label), "names", None)
    return None if names is None else list(names)


def _stated_samples(dataset: Any) -> int:
    stated = (dataset.info.splits or {}).get(str(dataset.split))
    if stated is None or not stated.num_examples:
        raise ArgumentError(
            "the stream does not state how many samples it has, which the schedules need; pass "
            "num_samples=."
        )
    return int(stated.num_examples)


def _picture(given: Any, key: str) -> Image.Image:
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim in (2, 3):
        given = Image.fromarray(given)
    if not isinstance(given, Image.Image):
        raise ArgumentError(
            f"{key} is {type(given).__name__}; expected a PIL image, or an array of bytes. Cast "
            "the column: dataset.cast_column(image, datasets.Image())."
        )
    return given.convert("RGB")


def _index(given: Any, key: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 0:
        raise ArgumentError(
            f"the label of {key} is {given!r}; expected a class index. Encode the column: "
            "dataset.class_encode_column(label)."
        )
    return int(given)
