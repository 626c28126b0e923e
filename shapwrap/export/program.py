"""A wrapped model as a `torch.export` program."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import ArgumentError, ExportError, ImageError
from shapwrap.export.compared import batches_of, compare
from shapwrap.export.exportable import Exportable, What, exportable
from shapwrap.images import check_finite
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import undisturbed
from shapwrap.wrapper import ShapleyWrapper

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of a comparison, relative, in half precision; else 1e-4."""


def to_torch(
    wrapped: ShapleyWrapper | ShapleyCLIP,
    images: Tensor,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float | None = None,
    **what: Unpack[What],
) -> ExportedProgram:
    """A program of (logits, values), without hooks and without shapwrap.

    Exported is what the model computes in eval mode, whatever its modes, which stay. Store it with
    `torch.export.save(program, path, extra_files=metadata(exportable(wrapped), images))`.

    Args:
        wrapped: A wrapped classifier or a `ShapleyCLIP`.
        images: An example batch [B, C, H, W], normalised (with `pixels` in [0, 1]). The program
            takes images of this height and width.
        dynamic_batch: Whether it takes any number of images, else B.
        check: Compare it with the wrapped model: on these images and, with `dynamic_batch`, on one
            and on one more.
        tolerance: Largest difference that passes, relative to the size of the logits (of their N-th
            part for values); by default 1e-4, 2e-2 in float16 and 1e-1 in bfloat16.
        **what: `values`, `pixels`, `normalization`, `texts`, `class_names` as in `exportable`.

    Raises:
        ExportError: torch cannot trace the model or keep the batch variable, or the comparison
            fails.
        ImageError: Images that the model refuses, or pixels outside of [0, 1].
        ImageTypeError: Images that are not floating point.
        ShapwrapError: What `exportable` says.
    """
    module = exportable(wrapped, **what)
    check_example(module, images)
    with quiet(module, images):
        program = traced(module, images, dynamic_batch=dynamic_batch)
        if check:
            batches = batches_of(images, dynamic=dynamic_batch)
            compare(program.module(), module, batches, tolerance_for(images, tolerance))
    return program


def traced(module: Exportable, images: Tensor, *, dynamic_batch: bool) -> ExportedProgram:
    """The program.

    Raises:
        ExportError: torch cannot trace the model, or keep the batch variable.
    """
    shapes: Any = None
    if dynamic_batch:
        # A batch of one would be taken for a constant.
        images = images if len(images) > 1 else torch.cat((images, images))
        shapes = ({0: Dim("batch")},)
    name = type(module.wrapped.model).__name__
    try:
        return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {name} ({first_line(error)}); expected a forward pass that "
            "depends on shapes alone. If its batch is what cannot vary, try dynamic_batch=False."
        ) from error


@contextmanager
def quiet(module: Exportable, images: Tensor) -> Iterator[None]:
    """Modes, gradients, autocast and random state of the outside play no role and stay."""
    with undisturbed(module), without_autocast(images):
        yield


def check_example(module: Exportable, images: Tensor) -> None:
    """Raise unless the model takes such images.

    Raises:
        ImageTypeError: Not floating point.
        ImageError: A shape or size that the model refuses, pixels that are not finite, or not in
            [0, 1] where the graph normalises them.
    """
    module.wrapped.grid_of(images)
    check_finite(images)
    low, high = float(images.min()), float(images.max())
    if module.pixels and (low < 0 or high > 1):
        raise ImageError(
            f"pixels=True came with images from {low:.3g} to {high:.3g}; expected pixels in "
            "[0, 1], which the exported graph normalises itself."
        )


def tolerance_for(images: Tensor, given: float | None) -> float:
    """What was given, else the default for this precision.

    Raises:
        ArgumentError: Not above 0.
    """
    if given is None:
        return TOLERANCES.get(images.dtype, 1e-4)
    if not given > 0:
        raise ArgumentError(f"tolerance is {given!r}; expected a number above 0.")
    return float(given)


def first_line(error: BaseException) -> str:
    """The kind of an error and its first line; those of torch go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
