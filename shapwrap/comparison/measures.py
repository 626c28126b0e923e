"""Metrics of a comparison: from the maps of one method to numbers with standard errors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shapwrap import metrics
from shapwrap.comparison.config import MetricConfig
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.maps import rows_of
from shapwrap.comparison.methods import Method
from shapwrap.comparison.models import PreparedModel
from shapwrap.comparison.store import Store
from shapwrap.comparison.summary import Measured, jackknife_error
from shapwrap.errors import ConfigurationError, UnsupportedBackboneError
from shapwrap.explanation import Explanation


class Batch(NamedTuple):
    """Some images with what was said of them."""

    images: Tensor
    """Float [B, 3, H, W] in [0, 1], on the device."""
    labels: Tensor
    masks: Tensor | None
    explanation: Explanation
    """On the CPU."""


@dataclass(frozen=True)
class Subject:
    """What a metric is asked about: one method on one model."""

    model: PreparedModel
    explanation: Explanation
    """Of all images, on the CPU."""
    facts: Mapping[str, Any]
    """Of how it was made, seconds among them."""
    bind: Callable[[], Method]
    """Makes, or loads, the method itself, where a metric has to call it again."""
    data: ComparisonData
    metric: MetricConfig
    store: Store
    batch_size: int
    chunk_size: int
    seed: int
    device: torch.device

    def batches(self) -> Iterator[Batch]:
        """The images of this metric, in order."""
        start = 0
        for sample in self.data.batches(self.batch_size, self.metric.images):
            stop = start + len(sample.image)
            said = rows_of(self.explanation, slice(start, stop))
            yield Batch(sample.image.to(self.device), sample.label, sample.mask, said)
            start = stop

    def generator(self) -> torch.Generator:
        """A new source of randomness, the same for every method and model."""
        return torch.Generator().manual_seed(self.seed)

    def predict(self) -> Any:
        """Images in [0, 1] to logits."""
        return metrics.predictor(self.model.module, self.model.normalization)

    def maps(self, batch: Batch) -> Tensor:
        """Maps as the options of the metric ask: of patches, or of pixels."""
        options = self.metric.options
        by_patch = options.get("ranking") == "patch" or options.get("fill") == "native"
        said = batch.explanation
        maps = said.values.view(-1, *said.grid) if by_patch else said.heatmap()
        return maps.to(self.device)


def faithfulness(subject: Subject) -> Measured:
    """AOPC, log-odds and SaCo; options are those of `shapwrap.metrics.faithfulness`."""
    return _removal(subject, metrics.faithfulness)


def insertion_deletion(subject: Subject) -> Measured:
    """Areas of both curves; options are those of `shapwrap.metrics.insertion_deletion`."""
    return _removal(subject, metrics.insertion_deletion)


def _removal(subject: Subject, metric: Callable[..., Any]) -> Measured:
    if subject.metric.options.get("fill") == "native" and subject.model.wrapped is None:
        raise UnsupportedBackboneError(
            "fill: native removes patches as a wrapped model does it; this model is plain."
        )
    predict, generator = subject.predict(), subject.generator()
    numbers: dict[str, list[Tensor]] = {}
    curves: dict[str, list[Tensor]] = {}
    scores: Any = None
    for batch in subject.batches():
        scores = metric(
            predict,
            batch.images,
            subject.maps(batch),
            target=batch.explanation.target.to(subject.device),
            chunk_size=subject.chunk_size,
            generator=generator,
            **subject.metric.options,
        )
        for name, values in scores.items():
            numbers.setdefault(name, []).append(values.cpu())
        for name, values in scores.curves.items():
            curves.setdefault(name, []).append(values.cpu())
    measured = Measured(protocol=dict(scores.protocol.settings))
    # The metric saw one batch at a time and was told the classes.
    measured.protocol["images"] = f"{sum(map(len, next(iter(numbers.values()))))} images in [0, 1]"
    measured.protocol["class"] = "predicted on the clean image"
    measured.add_images({name: torch.cat(parts) for name, parts in numbers.items()})
    for name, parts in curves.items():
        measured.add_curve(name, scores.fractions.cpu(), torch.cat(parts))
    return measured


def localisation(subject: Subject) -> Measured:
    """Pixel accuracy, mIoU and mAP over the data set, and the pointing game.

    Raises:
        ConfigurationError: The data has no masks.
    """
    if not subject.data.masks:
        raise ConfigurationError(
            "localisation needs masks, and this data has none; expected data of kind digits or "
            "pet, or of your own with masks."
        )
    if subject.metric.options:
        raise ConfigurationError(
            f"localisation takes no options; came {', '.join(subject.metric.options)}."
        )
    parts, pointed = [], []
    for batch in subject.batches():
        if batch.masks is None:
            raise ConfigurationError("an image of this data has no mask; expected one each.")
        maps, masks = batch.explanation.heatmap(), batch.masks
        parts.append(metrics.segmentation_statistics(maps, masks, chunk_size=subject.chunk_size))
        pointed.append(metrics.pointing_game(maps, masks))
    rows = {name: torch.cat([getattr(p, name) for p in parts]) for name in SEGMENTED}
    measured = Measured(
        protocol={
            "segmentation": "Chefer et al. 2021: map bilinear to the image, min-max, object above "
            "its mean; pixel accuracy and IoU of sums over the data set, IoU the mean of object "
            "and background; mAP the mean over images of average precision of both classes",
            "class": "predicted",
            "error": "jackknife over images; standard error of the mean for mAP and pointing",
            "constant maps": int(rows["constant"].sum()),
        }
    )
    measured.add_images(
        {
            "mean_average_precision": rows["average_precision"].nan_to_num(0.0),
            "pointing": torch.cat([p.hit for p in pointed]),
            "pointing_by_chance": torch.cat([p.chance for p in pointed]),
        }
    )
    counts = torch.stack((rows["correct"], rows["labelled"]), dim=1)
    overlap = torch.cat((rows["intersection"], rows["union"]), dim=1)
    for name, table, statistic in (
        ("pixel_accuracy", counts, _ratio),
        ("mean_iou", overlap, _mean_iou),
    ):
        measured.summary[name] = statistic(table.double().sum(dim=0))
        measured.errors[name] = jackknife_error(table, statistic)
    return measured


SEGMENTED = ("correct", "labelled", "intersection", "union", "average_precision", "constant")


def _ratio(sums: Tensor) -> float:
    return float(sums[0] / sums[1])


def _mean_iou(sums: Tensor) -> float:
    return float((sums[:2] / sums[2:]).mean())


def cost(subject: Subject) -> Measured:
    """What an explanation takes: forward passes of the same cost, and seconds.

    Options are those of `shapwrap.metrics.cost`: `repeats` times it against a forward pass.
    """
    batch = next(subject.batches())
    image = subject.model.normalize(batch.images[:1])
    target = batch.explanation.target[:1].to(subject.device)
    found = metrics.cost(subject.bind(), image, target, **subject.metric.options)
    images = int(subject.facts["images"])
    summary = {
        "forward_equivalents": float(found.forward_equivalents),
        "seconds": float(subject.facts["seconds"]) / images,
        "explainer_parameters": float(found.explainer_parameters),
    }
    if found.seconds_ratio is not None:
        summary["seconds_ratio"] = float(found.seconds_ratio)
    return Measured(
        summary=summary,
        protocol={
            "forward passes": "multiply-adds of the explanation of one image, gradients and the "
            "logits included, over those of its logits; training of the method is not counted",
            "seconds": f"an image, mean of {images}, {subject.batch_size} at a time",
        },
    )
