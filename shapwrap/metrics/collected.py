"""The metrics over a data set, as torchmetrics collects them over batches and processes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from shapwrap.errors import MissingDependencyError
from shapwrap.explainers.explained_model import Model
from shapwrap.metrics.faithfulness_of_maps import METRICS, checked_metrics, faithfulness
from shapwrap.metrics.insertion_deletion_curves import insertion_deletion
from shapwrap.metrics.protocol import Protocol, Scores

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingDependencyError(
        "metrics that collect over batches need torchmetrics; install it with "
        "pip install 'shapwrap[metrics]', or call the functions, which do not need it."
    ) from error


class MeanOverImages(Metric):
    """Means over all images seen, by every process; images without a number are left out.

    States are sums and counts, so memory does not grow with the data.
    """

    is_differentiable = False
    full_state_update: bool | None = False
    num_images: Tensor

    def __init__(
        self, measure: Callable[..., Scores], predict: Model, names: Sequence[str], kwargs: dict
    ):
        known = set(signature(measure).parameters) - {"predict", "images", "maps", "target"}
        super().__init__(**{name: each for name, each in kwargs.items() if name not in known})
        options = {name: each for name, each in kwargs.items() if name in known}
        # Inside the partial, so that a module does not become a part of this one.
        self._measure = partial(measure, predict, **options)
        self.names = tuple(names)
        self.protocol: Protocol | None = None
        """Of the last batch, in words."""
        for name in self.names:
            zero = torch.tensor(0.0, dtype=torch.float64)
            self.add_state(f"sum_{name}", zero, dist_reduce_fx="sum")
            self.add_state(f"defined_{name}", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, maps: Tensor, target: int | Tensor | None = None) -> None:
        """Measure one batch.

        Args:
            images: Float [B, C, H, W] in [0, 1].
            maps: Float [B, h, w] or [B, H, W].
            target: Class index, or one for each image; the predicted class if None.
        """
        scores = self._measure(images, maps, target=target)
        self.protocol = scores.protocol
        for name, values in scores.items():
            total, count = getattr(self, f"sum_{name}"), getattr(self, f"defined_{name}")
            setattr(self, f"sum_{name}", total + values.to(total).nansum())
            setattr(self, f"defined_{name}", count + (~torch.isnan(values)).sum().to(count))
        self.num_images = self.num_images + len(images)

    def compute(self) -> Mapping[str, Tensor]:
        """Mean by name, `undefined_<name>` images left out of each, and `num_images`.

        A mean is NaN where no image has a number.
        """
        result: dict[str, Tensor] = {}
        for name in self.names:
            defined = getattr(self, f"defined_{name}")
            result[name] = getattr(self, f"sum_{name}") / defined
            result[f"undefined_{name}"] = self.num_images - defined
        return result | {"num_images": self.num_images}


class Faithfulness(MeanOverImages):
    """Means of `faithfulness` over a data set.

    `compute()` gives a mapping with `aopc`, `log_odds` and `saco`, for each the number of images
    left out as `undefined_<name>`, and `num_images`.

    Args:
        predict: Images in [0, 1] to logits.
        metrics: Which to compute.
        kwargs: Options of `faithfulness` and of `torchmetrics.Metric`.

    Raises:
        ArgumentError: An unknown metric.
        MissingDependencyError: On import, if torchmetrics is not installed.
    """

    def __init__(self, predict: Model, *, metrics: Sequence[str] = METRICS, **kwargs: Any):
        wanted = checked_metrics(metrics)
        super().__init__(faithfulness, predict, wanted, kwargs | {"metrics": wanted})


class InsertionDeletion(MeanOverImages):
    """Means of `insertion_deletion` over a data set.

    `compute()` gives a mapping with `insertion` and `deletion`, for each the number of images left
    out as `undefined_<name>`, and `num_images`.

    Args:
        predict: Images in [0, 1] to logits.
        kwargs: Options of `insertion_deletion` and of `torchmetrics.Metric`.

    Raises:
        MissingDependencyError: On import, if torchmetrics is not installed.
    """

    def __init__(self, predict: Model, **kwargs: Any):
        super().__init__(insertion_deletion, predict, ("insertion", "deletion"), kwargs)
