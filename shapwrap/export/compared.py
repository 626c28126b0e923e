"""Exported outputs against those of the wrapped model itself, run eagerly by its public methods."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shapwrap.clip.output import similarities
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import ExportError
from shapwrap.export.exportable import Exportable
from shapwrap.masking.batch_norm import evaluation_mode

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""An exported model: from images to logits and values."""

TINY = 1e-30
"""Below any difference: keeps a model of zeros from being divided by 0."""


@dataclass(frozen=True)
class Compared:
    """The largest differences between exported and eager outputs, over all batches."""

    logits: float
    """max |exported - eager| logit."""
    values: float
    """max |exported - eager| patch value."""
    relative: float
    """The larger of the two, each over the size of what it is a rounding error of: the largest
    logit (or baseline), and that over N, or the largest value."""
    batches: tuple[int, ...]
    """Images in each batch that was compared."""


def batches_of(images: Tensor, *, dynamic: bool) -> list[Tensor]:
    """The images; where any number may come, also one alone and one more, mirrored."""
    if not dynamic:
        return [images]
    more = torch.cat((images, images[:1])).flip(-1)
    return [images, images[:1].flip(-1), more]


@torch.no_grad()
def compare(run: Run, module: Exportable, batches: Iterable[Tensor], tolerance: float) -> Compared:
    """Measured differences of an exported model to the eager one.

    Args:
        run: The exported model.
        module: What was exported.
        batches: Images to compare on.
        tolerance: The largest relative difference that passes.

    Raises:
        ExportError: A larger one, another shape, or numbers that are not finite.
    """
    logits, values, relative = [0.0], [0.0], [0.0]
    sizes = []
    for images in batches:
        found_logits, found_values = run(images)
        _check_shape(found_logits, (len(images), module.num_classes))
        expected_logits, expected_values = eager(module, images, found_logits.argmax(dim=1))
        _check_shape(found_values, expected_values.shape)
        size = max(float(expected_logits.abs().max()), float(module.baseline.abs().max()), TINY)
        share = max(size / expected_values.shape[1], float(expected_values.abs().max()))
        logits.append(_largest(found_logits, expected_logits))
        values.append(_largest(found_values, expected_values))
        relative += [logits[-1] / size, values[-1] / share]
        sizes.append(len(images))
    compared = Compared(max(logits), max(values), max(relative), tuple(sizes))
    if compared.relative > tolerance:
        raise ExportError(
            f"the exported model differs from the wrapped one by {compared.logits:.3g} in logits "
            f"and {compared.values:.3g} in values, {compared.relative:.3g} of their size; expected "
            f"at most {tolerance:g}. Pass a larger tolerance= if that is good enough for you."
        )
    return compared


@torch.no_grad()
def eager(module: Exportable, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and values by the wrapped model's own methods.

    The values of one class are those of `target`, as the exported model predicts it: of two equal
    logits rounding may favour either.

    Args:
        module: What was exported.
        images: As the exported model takes them.
        target: A class for each image.
    """
    source, texts = module.source, module.text_features
    images, target = module.normalized(images), target.to(images.device)
    with evaluation_mode(source.modules()):
        if not isinstance(source, ShapleyCLIP):
            if module.values == "predicted":
                explanation = source.explain(images, target)
                return explanation.logits, explanation.values
            logits: Tensor = source(images)
            return logits, source.attribute(images)
        if texts is None:
            raise ExportError("a ShapleyCLIP came without texts; expected exportable(clip, texts=)")
        values = source.attribute(images, texts)
        logits = similarities(source.encode_image(images), texts)
    if module.values == "predicted":
        values = values[torch.arange(len(images), device=images.device), :, target]
    return logits, values


def _check_shape(found: Tensor, expected: Sequence[int]) -> None:
    if found.shape != tuple(expected):
        raise ExportError(
            f"for {expected[0]} images the exported model returns shape {tuple(found.shape)}; the "
            f"wrapped one {tuple(expected)}. Export with the batch that will come and "
            "dynamic_batch=False."
        )


def _largest(found: Tensor, expected: Tensor) -> float:
    difference = (found.to(expected) - expected).abs().max()
    # NaN compares with nothing, and would pass.
    return float(torch.nan_to_num(difference, nan=torch.inf))
