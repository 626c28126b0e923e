"""The maps of one method for one model, over all images: made once, measured many times."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.methods import Method
from shapwrap.comparison.models import PreparedModel
from shapwrap.errors import ShapwrapError
from shapwrap.explanation import Explanation


def explain_all(
    method: Method,
    model: PreparedModel,
    data: ComparisonData,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the predicted class of each image, as `restore` takes them.

    Raises:
        ShapwrapError: The method explains another class, or says something that is not finite.
    """
    parts: list[Explanation] = []
    seconds = 0.0
    for batch in data.batches(batch_size):
        images = model.normalize(batch.image.to(device))
        with torch.no_grad():
            target = model.module(images).argmax(dim=1)
        started = time.perf_counter()
        made = method(images, target)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - started
        if not torch.equal(made.target.to(target.device), target):
            raise ShapwrapError(
                "the method explains another class than it was asked for; expected an explanation "
                "whose target is the target given."
            )
        if not torch.isfinite(made.values).all():
            raise ShapwrapError("the method gave values that are not finite; expected finite ones.")
        parts.append(made)
    first = parts[0]
    tensors = {
        "values": torch.cat([part.values.float().cpu() for part in parts]),
        "logits": torch.cat([part.logits.float().cpu() for part in parts]),
        "target": torch.cat([part.target.cpu() for part in parts]),
        "total": torch.cat([part.explained().float().cpu() for part in parts]),
    }
    if first.pixels is not None:
        tensors["pixels"] = torch.cat(
            [part.pixels.float().cpu() for part in parts if part.pixels is not None]
        )
    facts = {
        "grid": list(first.grid),
        "image_size": list(first.image_size),
        "covered": None if first.covered is None else list(first.covered),
        "contrast": first.contrast,
        "method": first.method,
        "images": len(data),
        "seconds": seconds,
        "largest_efficiency_gap": _largest(torch.cat([p.efficiency_gap().cpu() for p in parts])),
    }
    return tensors, facts


def restore(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Explanation:
    """The explanation of all images, on the CPU."""
    covered = facts["covered"]
    return Explanation(
        values=tensors["values"],
        logits=tensors["logits"],
        target=tensors["target"],
        grid=(facts["grid"][0], facts["grid"][1]),
        image_size=(facts["image_size"][0], facts["image_size"][1]),
        contrast=facts["contrast"],
        covered=None if covered is None else (covered[0], covered[1]),
        method=facts["method"],
        pixels=tensors.get("pixels"),
        total=tensors["total"],
    )


def rows_of(explanation: Explanation, rows: slice | list[int]) -> Explanation:
    """The explanation of some of its images."""
    pixels, total = explanation.pixels, explanation.total
    return replace(
        explanation,
        values=explanation.values[rows],
        logits=explanation.logits[rows],
        target=explanation.target[rows],
        pixels=None if pixels is None else pixels[rows],
        total=None if total is None else total[rows],
    )


def _largest(gaps: Tensor) -> float | None:
    """None where the method claims no sum."""
    known = gaps[~gaps.isnan()]
    return float(known.max()) if len(known) else None
