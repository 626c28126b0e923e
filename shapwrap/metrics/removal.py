"""What a model says once parts of each image are gone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap._types import Images, Logits
from shapwrap.errors import ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.masking.fillers import Filler
from shapwrap.masking.pooling import compute_dtype
from shapwrap.metrics.fillers import make_filler
from shapwrap.metrics.predictor import Predictor

Interval = tuple[int, int]
"""First rank that is taken away, and the first one after it that is not."""


class Removal(ABC):
    """Images, parts of which can be taken away."""

    ranks: Int[Tensor, "batch parts"]
    """Place of each part, 0 for the most relevant."""

    @abstractmethod
    def __call__(self, image: Int[Tensor, " items"], gone: Bool[Tensor, "items parts"]) -> Logits:
        """Logits of the images of these indices, without the parts that are gone."""


class FilledPixels(Removal):
    """Pixels that are gone are replaced; works with any model.

    Args:
        model: From such images to logits.
        images: As the model takes them.
        filler: In the same space.
        ranks: Of the pixels, row by row.
        image_of: Of each row of `ranks`, where an image has several; else the rows are the images'.
    """

    def __init__(
        self,
        model: ExplainedModel,
        images: Images,
        filler: Filler,
        ranks: Int[Tensor, "rows pixels"],
        image_of: Int[Tensor, " rows"] | None = None,
    ):
        self.model = model
        self.images = images
        self.filler = filler
        self.ranks = ranks
        self.image_of = image_of

    def __call__(self, image: Int[Tensor, " items"], gone: Bool[Tensor, "items pixels"]) -> Logits:
        """Logits of these images, filled where pixels are gone."""
        image = image if self.image_of is None else self.image_of[image]
        mask = gone.reshape(-1, 1, *self.images.shape[-2:])
        filler = self.filler if len(self.filler) == 1 else self.filler.index_select(0, image)
        copies = self.images.index_select(0, image)
        # In place: a second buffer of this size costs more than the filling.
        torch.where(mask, filler, copies, out=copies)
        return self.model.logits(copies)


def filling(
    predict: ExplainedModel | Predictor,
    images: Images,
    fill: str | Tensor,
    generator: torch.Generator | None,
) -> tuple[ExplainedModel, Images, Filler]:
    """What `FilledPixels` begins with, for images in [0, 1] that are filled before normalisation.

    Raises:
        ArgumentError: A filler that cannot be had for these images.
    """
    if isinstance(predict, ExplainedModel):
        return predict, images, make_filler(fill, images, None, generator)
    filler = make_filler(fill, images, predict.normalization, generator)
    # Normalised pixel by pixel, so once before the filling instead of once a copy.
    return predict.explained, predict.normalize(images), predict.normalize(filler)


class RemovedPatches(Removal):
    """Patches that are gone are hidden as the wrapped model hides them.

    Args:
        predict: Of a wrapped model.
        images: In [0, 1].
        ranks: Of the patches.
        pairs: Whether item 2i + 1 has gone what item 2i has kept, which a token model evaluates in
            one pass.
    """

    def __init__(
        self,
        predict: Predictor,
        images: Images,
        ranks: Int[Tensor, "batch patches"],
        *,
        pairs: bool = False,
    ):
        self.predict = predict
        self.images = images
        self.ranks = ranks
        self.coalitions_an_item = 2 if pairs else 1

    def __call__(self, image: Int[Tensor, " items"], gone: Bool[Tensor, "items patches"]) -> Logits:
        """v(s) + v(empty) of these images, s the patches that are left."""
        coalitions = (~gone).unflatten(0, (-1, self.coalitions_an_item))
        images = self.images[image[:: self.coalitions_an_item]]
        return self.predict.coalition_logits(images, coalitions).flatten(0, 1)


def log_probabilities(
    removal: Removal,
    intervals: Sequence[Interval],
    target: Int[Tensor, " batch"],
    chunk_size: int,
) -> Float[Tensor, "batch steps"]:
    """Log-probability of the target with the parts of each interval of ranks gone."""
    answers = answers_without(removal, intervals, chunk_size)
    parts = [of_target(logits, target[image]) for image, logits in answers]
    return torch.cat(parts).unflatten(0, (len(removal.ranks), len(intervals)))


def answers_without(
    removal: Removal, intervals: Sequence[Interval], chunk_size: int
) -> Iterator[tuple[Int[Tensor, " items"], Logits]]:
    """What the model says with the parts of each interval of ranks gone, in chunks.

    Every image (or row of ranks) and interval is an item, those of the first image first; items of
    all images go through the model together, `chunk_size` at a time. With each chunk come the
    images of its items.
    """
    ranks, steps = removal.ranks, len(intervals)
    bounds = torch.tensor(intervals, dtype=ranks.dtype, device=ranks.device)
    for item in torch.arange(len(ranks) * steps, device=ranks.device).split(chunk_size):
        image, step = item // steps, item % steps
        first, after = bounds[step, :1], bounds[step, 1:]
        rank = ranks.index_select(0, image)
        yield image, removal(image, (rank >= first) & (rank < after))


def clean_logits(model: ExplainedModel, images: Images, chunk_size: int) -> Logits:
    """Logits of the images as they are."""
    return torch.cat([model.logits(part) for part in images.split(chunk_size)])


def of_target(logits: Logits, target: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Log-probability of one class each, finite where it is not NaN, in float32 or float64."""
    logits = logits.to(compute_dtype(logits))
    picked = logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    return picked.clamp(min=torch.finfo(picked.dtype).min)


def check_probabilities(values: Float[Tensor, "batch steps"]) -> None:
    """Raise if any is NaN; waits for the device.

    Raises:
        ShapwrapError: Which images.
    """
    bad = torch.isnan(values).any(dim=1)
    if bad.any():
        raise ShapwrapError(
            f"the logits of images {bad.nonzero()[:, 0].tolist()}, or of perturbed copies of "
            "them, contain NaN or +infinity; expected logits with a softmax. Run the model in "
            "float32."
        )
