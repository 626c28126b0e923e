"""Zero-shot classification: whether the class's text is among the closest."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap.clip.output import similarities
from shapwrap.errors import ArgumentError, ShapwrapError
from shapwrap.explanation import check_target
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import compute_dtype
from shapwrap.metrics.candidates import TIES, checked_features, checked_ks, rounding
from shapwrap.metrics.protocol import ItemScores, Protocol


@torch.no_grad()
def zero_shot(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    weights: Tensor,
    *,
    ks: Sequence[int] = (1, 5),
) -> ItemScores:
    """Top-k accuracy of image embeddings against one embedding a class.

    A mapping with float tensors `top<k>` [B], one an image, 1 for a hit and 0 for a miss; `.mean()`
    has the accuracies, `.protocol` every choice. Which classes come first does not depend on the
    length of the image embedding, so plain and wrapped models compare alike. Ties count against: of
    similarities that are equal up to rounding the right class comes last.

    Args:
        model: With `encode_image`, such as `ShapleyCLIP` or an open_clip model, or a function, from
            images to embeddings [B, E]. A module runs in eval mode.
        batches: Pairs of images as the model takes them, normalised, and labels int [B], such as a
            DataLoader; both are moved to the device of the weights.
        weights: Float [E, K], one column a class, as `open_clip.build_zero_shot_classifier` returns
            them.
        ks: Which k; one that is at least K always hits.

    Raises:
        ArgumentError: Weights that are not [E, K], or of another E; no batch, or one that is no
            pair; or a bad k.
        TargetError: Labels that are not one class an image.
        ShapwrapError: Embeddings that are not finite, and what the model says of the images.
    """
    wanted = checked_ks(ks)
    classes = checked_features(weights, "weights")
    encode: Any = getattr(model, "encode_image", model)
    if not callable(encode) or isinstance(model, type):
        raise ArgumentError(
            f"model is {model!r}; expected one with encode_image, or a function of images."
        )
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    places: list[Tensor] = []
    for batch in batches:
        images, labels = _checked_batch(batch)
        with evaluation_mode(modules):
            features = encode(images.to(classes.device))
        places.append(_places(features, labels, classes, len(images)))
    if not places:
        raise ArgumentError("batches held none; expected pairs of images and labels.")
    place = torch.cat(places)
    settings = {
        "model": getattr(model, "__name__", type(model).__name__),
        "images": f"{len(place)}",
        "classes": f"{classes.shape[1]}, one embedding each",
        "similarity": "dot product of image and class embeddings, in at least float32",
        "ties": TIES,
    }
    return ItemScores(
        {f"top{k}": (place <= k).float() for k in wanted},
        protocol=Protocol.of("zero-shot classification", settings),
    )


def _checked_batch(batch: object) -> tuple[Tensor, object]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ArgumentError(
            f"a batch is {type(batch).__name__}; expected a pair of images and labels."
        )
    images, labels = batch
    if not isinstance(images, Tensor) or not len(images):
        came = "empty" if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"the images of a batch are {came}; expected a tensor [B >= 1, ...].")
    return images, labels


def _places(features: object, labels: object, classes: Tensor, num_images: int) -> Tensor:
    """Place of the right class for each image, 1 for the first."""
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(features, Tensor) or shape != (num_images, len(classes)):
        raise ArgumentError(
            f"the model gives {shape} for {num_images} images; expected embeddings "
            f"[{num_images}, {len(classes)}], as many dimensions as the weights have rows."
        )
    features = features.to(compute_dtype(features))
    found = similarities(features, classes.mT)
    if not torch.isfinite(found).all():
        raise ShapwrapError(
            "the embeddings of a batch hold NaN or infinity; expected finite ones. Run the model "
            "in float32, and look at the images."
        )
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        came = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ArgumentError(f"labels are {came}; expected one class an image, int64 [B].")
    right = check_target(labels.to(found.device), found)[:, None]
    least = found.gather(1, right) - rounding(features, classes.mT[right[:, 0]])
    ahead = (found >= least).scatter(1, right, False)
    return 1 + ahead.sum(dim=1)
