"""Training data of explainers: batches of images, with or without labels."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from shapwrap.errors import ImageError, ImageTypeError, TrainingError
from shapwrap.training.position import loader_generators
from shapwrap.training.random_stream import global_states_kept


def images_of(batch: Any) -> Tensor:
    """The images of a batch.

    Raises:
        TrainingError: It has none.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TrainingError(
            f"a batch of the training data is {came}; expected images [B, C, H, W], or a pair "
            "(images, labels)."
        )
    return images


def images_like(first: Tensor, images: Tensor) -> Tensor:
    """The images in the precision of the first batch.

    Raises:
        ImageTypeError: They are not floating point.
        ImageError: They are of another size.
    """
    if not images.is_floating_point():
        raise ImageTypeError(
            f"training images are {images.dtype}; expected floating point, normalised as the "
            "model was trained."
        )
    if images.shape[1:] != first.shape[1:]:
        raise ImageError(
            f"training images have shape {tuple(images.shape)}, those of the first batch "
            f"{tuple(first.shape[1:])} each; expected one size. Resize them."
        )
    return images.to(first.dtype)


def first_images(data: Iterable[Any]) -> Tensor:
    """The images of the first batch; no random state is moved by the look.

    Raises:
        TrainingError: There is none, or the data can be read only once.
    """
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise TrainingError(
            f"the training data is {type(data).__name__}; expected batches that can be iterated "
            "once an epoch: a DataLoader, or a list."
        )
    generators = list(loader_generators(data))
    states = [generator.get_state() for generator in generators]
    with global_states_kept():
        batch = next(iter(data), None)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    if batch is None:
        raise TrainingError("the training data is empty; expected batches of images.")
    return images_of(batch)
