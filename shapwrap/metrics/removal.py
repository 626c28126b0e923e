"""What a model says once parts of each image are gone."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapwrap._types import Images, Logits
from shapwrap.errors import ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.masking.pooling import compute_dtype
from shapwrap.metrics.fillers import Filler
from shapwrap.metrics.predictor import Predictor

Interval = tuple[int, int]
"""First rank that is taken away, and the first one after it that is not."""

Respond = Callable[[Int[Tensor, " items"], Bool[Tensor, "items cells"]], Logits]
"""From indices of images and the cells that are gone to logits."""


class FilledPixels:
    """Pixels of cells that are gone are replaced; works with any model."""

    def __init__(
        self,
        model: ExplainedModel,
        images: Images,
        filler: Filler,
        cell_of_pixel: Int[Tensor, " pixels"] | None,
    ):
        self.model = model
        self.images = images
        self.filler = filler
        self.cell_of_pixel = cell_of_pixel

    def __call__(
        self, image: Int[Tensor, " items"], removed: Bool[Tensor, "items cells"]
    ) -> Logits:
        """Logits of these images, filled where cells are gone."""
        gone = removed if self.cell_of_pixel is None else removed[:, self.cell_of_pixel]
        gone = gone.reshape(-1, 1, *self.images.shape[-2:])
        filler = self.filler if len(self.filler) == 1 else self.filler[image]
        return self.model.logits(torch.where(gone, filler, self.images[image]))


class RemovedPatches:
    """Patches that are gone are hidden as the wrapped model hides them.

    Args:
        predict: Of a wrapped model.
        images: In [0, 1].
        pairs: Whether item 2i + 1 has gone what item 2i has kept, which a token model evaluates in
            one pass.
    """

    def __init__(self, predict: Predictor, images: Images, *, pairs: bool = False):
        self.predict = predict
        self.images = images
        self.coalitions_an_item = 2 if pairs else 1

    def __call__(
        self, image: Int[Tensor, " items"], removed: Bool[Tensor, "items cells"]
    ) -> Logits:
        """v(s) + v(empty) of these images, s the patches that are left."""
        coalitions = (~removed).unflatten(0, (-1, self.coalitions_an_item))
        images = self.images[image[:: self.coalitions_an_item]]
        return self.predict.coalition_logits(images, coalitions).flatten(0, 1)


def log_probabilities(
    respond: Respond,
    ranks: Int[Tensor, "batch cells"],
    intervals: Sequence[Interval],
    target: Int[Tensor, " batch"],
    chunk_size: int,
) -> Float[Tensor, "batch steps"]:
    """Log-probability of the target with the cells of each interval of ranks gone.

    Every image and interval is an item; items of all images go through the model together,
    `chunk_size` at a time.
    """
    bounds = torch.tensor(intervals, dtype=ranks.dtype, device=ranks.device)
    steps = len(intervals)
    parts = []
    for item in torch.arange(len(ranks) * steps, device=ranks.device).split(chunk_size):
        image, step = item // steps, item % steps
        first, after = bounds[step, :1], bounds[step, 1:]
        rank = ranks[image]
        logits = respond(image, (rank >= first) & (rank < after))
        parts.append(of_target(logits, target[image]))
    return torch.cat(parts).unflatten(0, (len(ranks), steps))


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
