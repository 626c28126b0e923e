"""Images with all their captions, for evaluation: nothing is drawn, nothing is split."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from shapwrap._types import Images
from shapwrap.arguments import check_at_least
from shapwrap.data.image_text_sample import (
    Transform,
    captions_of,
    picture_of,
    stacked,
    transformed,
)
from shapwrap.data.shard_files import Shards, expand_shards
from shapwrap.data.shard_plan import Span
from shapwrap.data.shard_reader import StoredSample, read_span
from shapwrap.data.skipped import Skip, Skipped


class CaptionedImages(NamedTuple):
    """Images, and every caption of each, as `shapwrap.metrics.retrieval` takes them."""

    images: Images
    captions: list[str]
    image_of_text: Int[Tensor, " texts"]
    """Which of these images a caption belongs to."""


def captioned_images(
    shards: Shards, transform: Transform, *, batch_size: int | None = None
) -> Iterator[CaptionedImages]:
    """Batches of images in the order of the shards, with all their captions.

    What cannot be used is left out, counted, and reported at the end in one `SkippedSampleWarning`.

    Args:
        shards: As in `ImageTextShards`.
        transform: From a PIL image in RGB to a float tensor, one size for all.
        batch_size: Images at a time; all at once by default.

    Raises:
        ArgumentError: No shard, or a batch size below 1; on the way, images of several shapes.
        MissingDependencyError: webdataset is not installed.
    """
    if batch_size is not None:
        check_at_least("batch_size", batch_size, 1)
    return _batches(expand_shards(shards), transform, batch_size)


def _batches(
    shards: list[str], transform: Transform, batch_size: int | None
) -> Iterator[CaptionedImages]:
    skipped = Skipped(instead="")
    found = _usable(shards, transform, skipped)
    try:
        while batch := list(islice(found, batch_size)):
            images, captions = zip(*batch, strict=True)
            counts = torch.tensor([len(texts) for texts in captions])
            yield CaptionedImages(
                stacked(images),
                [text for texts in captions for text in texts],
                torch.arange(len(images)).repeat_interleave(counts),
            )
    finally:
        skipped.warn_once()


def _usable(
    shards: list[str], transform: Transform, skipped: Skipped
) -> Iterator[tuple[Tensor, list[str]]]:
    for number, shard in enumerate(shards):
        for sample in read_span(shard, Span(number, 0, None), None):
            found = sample if isinstance(sample, Skip) else _decoded(sample, transform)
            if isinstance(found, Skip):
                skipped.add([found])
            else:
                yield found


def _decoded(sample: StoredSample, transform: Transform) -> tuple[Tensor, list[str]] | Skip:
    captions = captions_of(sample)
    if not captions:
        return Skip("without a caption", sample.key)
    image = picture_of(sample)
    if isinstance(image, Skip):
        return image
    return transformed(image, transform, sample.key), captions
