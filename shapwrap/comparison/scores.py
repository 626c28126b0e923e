"""Table 1: what a model gets right, and what it costs."""

from typing import Any

import torch

from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.models import PreparedModel
from shapwrap.comparison.summary import standard_error
from shapwrap.report import count_multiply_adds, count_parameters


@torch.no_grad()
def model_scores(
    model: PreparedModel,
    data: ComparisonData,
    num_classes: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy on the images to test on, parameters, and multiply-adds of one image.

    No accuracy where labels are unknown (negative), or the model's classes are not the data's.
    """
    module = model.module
    correct, known = [], True
    image = None
    for batch in data.test_batches(batch_size):
        images = model.normalize(batch.image.to(device))
        image = images[:1] if image is None else image
        logits = module(images)
        known = known and logits.shape[1] == num_classes and bool((batch.label >= 0).all())
        correct.append((logits.argmax(dim=1).cpu() == batch.label).double())
    right = torch.cat(correct)
    wrapped = model.wrapped
    attributed = None
    if wrapped is not None:
        attributed = count_multiply_adds(wrapped, lambda: wrapped.attribute(image))  # pyright: ignore[reportArgumentType]
    return {
        "accuracy": float(right.mean()) if known else None,
        "accuracy_error": standard_error(right) if known else None,
        "accuracy_images": len(right) if known else None,
        "parameters": count_parameters(module),
        "multiply_adds": count_multiply_adds(module, lambda: module(image)),
        "multiply_adds_explained": attributed,
    }
