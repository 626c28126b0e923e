"""Localisation that collects over batches and processes, as torchmetrics does."""

import warnings
from typing import Any

import torch
from torch import Tensor

from shapwrap.errors import ArgumentError, MissingDependencyError
from shapwrap.metrics.boxes import Threshold, box_localisation
from shapwrap.metrics.pointing import pointing_game
from shapwrap.metrics.segmentation import SegmentationTotals, segmentation_statistics

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingDependencyError(
        "this class needs torchmetrics; run: pip install 'shapwrap[metrics]', or use the functions "
        "of shapwrap.metrics, which need nothing."
    ) from error


class Segmentation(Metric):
    """Pixel accuracy, mIoU, mAP and mF1 in Chefer's protocol; see `segmentation_statistics`.

    `compute` returns a dictionary of scalars: `pixel_accuracy`, `mean_iou`,
    `mean_average_precision`, `mean_f1`, `images`, `constant`, `unlabelled`.

    Args:
        chunk_size: Images that are sorted at a time.
        options: Of torchmetrics.Metric.
    """

    full_state_update = False

    def __init__(self, *, chunk_size: int = 32, **options: Any):
        super().__init__(**options)
        self.chunk_size = chunk_size
        for name in SegmentationTotals._fields:
            two = name in ("intersection", "union")
            dtype = torch.float64 if name in ("average_precision", "f1") else torch.long
            zero = torch.zeros(2 if two else (), dtype=dtype)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch: maps [B, h, w] or [B, H, W], masks [B, H, W] with labels 1, 0, -1."""
        statistics = segmentation_statistics(maps, masks, chunk_size=self.chunk_size)
        for name, total in statistics.totals()._asdict().items():
            setattr(self, name, getattr(self, name) + total)

    def compute(self) -> dict[str, Tensor]:
        """Result over everything that was added.

        Raises:
            ArgumentError: No image with a labelled pixel was added.
        """
        totals = SegmentationTotals(*(getattr(self, name) for name in SegmentationTotals._fields))
        scores = totals.scores()._asdict()
        del scores["protocol"]
        return {name: torch.tensor(score) for name, score in scores.items()}


class PointingGame(Metric):
    """Share of images whose strongest pixel lies on the object; see `pointing_game`.

    `compute` returns a dictionary of scalars: `hit`, `chance`, `images`, and `undefined`, images
    without an object, which are left out.

    Args:
        tolerance: Pixels at most this far from the object count as hits.
        options: Of torchmetrics.Metric.
    """

    full_state_update = False

    def __init__(self, *, tolerance: float | int = 0, **options: Any):
        super().__init__(**options)
        self.tolerance = tolerance
        _add_sums(self, "hit", "chance")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch: maps [B, h, w] or [B, H, W], masks [B, H, W] with labels 1, 0, -1."""
        found = pointing_game(maps, masks, tolerance=self.tolerance)
        _add(self, hit=found.hit, chance=found.chance)

    def compute(self) -> dict[str, Tensor]:
        """Means over the images with an object.

        Raises:
            ArgumentError: None was added.
        """
        return _means(self, "hit", "chance")


class BoxIoU(Metric):
    """Mean IoU of the box around a map with the true box; see `box_localisation`.

    `compute` returns a dictionary of scalars: `iou`, `correct` (share of images with an IoU of at
    least 0.5), `images`, and `undefined`, images without an object, which are left out.

    Args:
        threshold: "mean", or a fraction of the maximum.
        largest_component: Box around the largest connected region alone.
        options: Of torchmetrics.Metric.
    """

    full_state_update = False

    def __init__(
        self,
        *,
        threshold: Threshold | str = "mean",
        largest_component: bool = True,
        **options: Any,
    ):
        super().__init__(**options)
        self.threshold = threshold
        self.largest_component = largest_component
        _add_sums(self, "iou", "correct")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch: maps [B, h, w] or [B, H, W], masks [B, H, W] with labels 1, 0, -1."""
        iou = box_localisation(
            maps, masks, threshold=self.threshold, largest_component=self.largest_component
        ).iou
        _add(self, iou=iou, correct=torch.where(iou.isnan(), iou, (iou >= 0.5).to(iou)))

    def compute(self) -> dict[str, Tensor]:
        """Means over the images with an object.

        Raises:
            ArgumentError: None was added.
        """
        return _means(self, "iou", "correct")


def _add_sums(metric: Metric, *names: str) -> None:
    for name in names:
        metric.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
    for name in ("images", "undefined"):
        metric.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")


def _add(metric: Any, **scores: Tensor) -> None:
    for name, score in scores.items():
        setattr(metric, name, getattr(metric, name) + score.double().nansum())
    undefined = next(iter(scores.values())).isnan()
    metric.images = metric.images + (~undefined).sum()
    metric.undefined = metric.undefined + undefined.sum()


def _means(metric: Any, *names: str) -> dict[str, Tensor]:
    if metric.images == 0:
        raise ArgumentError(
            "no image with an object was added; expected masks that hold label 1 somewhere. Call "
            "update first, and look at the masks."
        )
    if metric.undefined > 0:
        warnings.warn(
            f"{int(metric.undefined)} images without an object are left out.", stacklevel=3
        )
    means = {name: getattr(metric, name) / metric.images for name in names}
    return {**means, "images": metric.images, "undefined": metric.undefined}
