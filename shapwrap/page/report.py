"""The page of an explanation, `report.html`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap._version import __version__
from shapwrap.audit import Audit
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation
from shapwrap.page.class_values import (
    as_floats,
    deflated,
    finest_that_fit,
    quantize,
    sums_of,
)
from shapwrap.page.picture import data_uri
from shapwrap.page.template import assemble
from shapwrap.page.trust import trust_of
from shapwrap.plotting import check_drawable, true_colors

BYTES_PER_IMAGE = 249_000
"""What a page takes for each image at the most, where coarser steps can bring it there."""

TOP_CLASSES = 10
"""Classes of each image whose values are stored as they are, in float32."""

FEW_VALUES = 12_000
"""As many values an image are stored as they are, of all classes."""


def report_page(
    explanation: Explanation,
    images: Tensor,
    *,
    audit: Audit | None,
    normalization: Normalization | None,
    class_names: Sequence[str] | None,
    captions: Sequence[str] | None,
    title: str,
) -> str:
    """See `Explanation.save`.

    Raises:
        ImageError: The images are not those that were explained.
        PlotError: The true colours cannot be told, or not one name a class.
        ArgumentError: Captions or an audit of another number of images.
    """
    check_drawable(explanation, images, class_names)
    batch = len(images)
    for name, given in (("captions", captions), ("audit", audit and audit.residual)):
        if given is not None and len(given) != batch:
            raise ArgumentError(f"{name} is of {len(given)} images; expected {batch}.")
    pictures = true_colors(images.detach().float().cpu(), normalization)
    numbers = _Numbers(explanation)
    shown = [
        {
            "caption": str(captions[row]) if captions is not None else f"Image {row + 1}",
            "picture": data_uri(pictures[row]),
            **numbers.of_image(row),
            "skill": _finite(audit.skill[row]) if audit is not None else None,
            "residual": _finite(audit.residual[row]) if audit is not None else None,
            "trust": trust_of(audit, row, explanation.method)._asdict(),
        }
        for row in range(batch)
    ]
    data = {
        "title": title,
        "version": __version__,
        "method": explanation.method,
        "unit": explanation.unit,
        "contrast": explanation.contrast,
        "grid": explanation.grid,
        "imageSize": explanation.image_size,
        "covered": explanation.covered or explanation.image_size,
        "classNames": None if class_names is None else [str(name) for name in class_names],
        "numClasses": explanation.logits.shape[1],
        "baseline": numbers.baseline,
        "allClasses": explanation.all_values is not None,
        "audit": None
        if audit is None
        else {"skill": _finite(audit.overall_skill), "coalitions": audit.num_coalitions},
        "images": shown,
    }
    room = BYTES_PER_IMAGE * batch - len(assemble(title, data).encode())
    for image, rest in zip(shown, numbers.rest(room), strict=True):
        image["rest"] = rest
    return assemble(title, data)


class _Numbers:
    """Everything of an explanation that is a number, as the page reads it."""

    def __init__(self, explanation: Explanation):
        self._explanation = explanation
        self._values = explanation.values.detach().cpu().float()
        self._every = None
        if explanation.all_values is not None:
            self._every = explanation.all_values.detach().cpu().float().transpose(1, 2)
        self._logits = explanation.logits.detach().cpu().float()
        baseline = explanation.baseline
        self._baseline = torch.as_tensor(baseline).detach().cpu().float()
        self.baseline = as_floats(self._baseline) if self._baseline.ndim else float(baseline)

    def of_image(self, row: int) -> dict[str, Any]:
        """Logits, the sum's other terms, and the values that are stored as they are."""
        explanation, target = self._explanation, int(self._explanation.target[row])
        classes = self._exact_classes(row)
        total = None if explanation.total is None else float(explanation.total[row])
        gains = self._logits[row].double() - self._baseline
        return {
            "target": target,
            "logits": as_floats(self._logits[row]),
            # Of all classes, which `contrast` took off the values.
            "meanGain": float(gains.mean()) if explanation.contrast else 0.0,
            "claim": "logit" if total is None else "none" if math.isnan(total) else "total",
            "total": None if total is None else _finite(total),
            "exact": {"classes": classes, "values": as_floats(self._rows(row, classes))},
            "rest": None,
        }

    def rest(self, room: int) -> list[dict[str, Any] | None]:
        """All classes of each image in steps, which together take `room` characters if they can."""
        every, batch = self._every, len(self._values)
        if every is None or every[0].numel() <= FEW_VALUES:
            return [None] * batch
        sums = [sums_of(rows) for rows in every]
        # Per class a step and two sums, in base64.
        room -= batch * (3 * 16 * math.ceil(every.shape[1] / 3) + 100)
        levels = finest_that_fit(list(every), room)
        stored: list[dict[str, Any] | None] = []
        for rows, (positive, negative) in zip(every, sums, strict=True):
            quantized = quantize(rows, levels)
            stored.append(
                {
                    "levels": levels,
                    "steps": as_floats(quantized.steps),
                    "positive": as_floats(positive),
                    "negative": as_floats(negative),
                    "counts": deflated(quantized.counts),
                }
            )
        return stored

    def _exact_classes(self, row: int) -> list[int]:
        target = int(self._explanation.target[row])
        if self._every is None:
            return [target]
        if self._every[row].numel() <= FEW_VALUES:
            return list(range(len(self._every[row])))
        top = self._logits[row].topk(min(TOP_CLASSES, self._logits.shape[1])).indices.tolist()
        return sorted({target, *top})

    def _rows(self, row: int, classes: list[int]) -> Float[Tensor, "some patches"]:
        return self._values[row : row + 1] if self._every is None else self._every[row, classes]


def _finite(number: Tensor | float) -> float | None:
    """None for what JSON cannot say."""
    return float(number) if math.isfinite(float(number)) else None
