"""One model from its name to its row."""

import time
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn

from shapwrap.backbones.tower_whole import embedding_of
from shapwrap.errors import MissingHeadError, ShapwrapError
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.zoo.catalogue import ModelName, quiet
from shapwrap.zoo.checks import (
    check_leak,
    check_logits,
    check_other_size,
    check_sums,
    passed_if,
)
from shapwrap.zoo.construct import Specimen, construct
from shapwrap.zoo.row import Row
from shapwrap.zoo.shrink import Limits
from shapwrap.zoo.similarity_checks import check_similarities
from shapwrap.zoo.train_checks import check_gradients, check_step, parameters_in_use

NUM_CLASSES = 10


def survey_model(
    name: ModelName, *, seed: int = 0, limits: Limits | None = None, versions: str = ""
) -> Row:
    """Builds, wraps and checks one model; whatever is raised ends up in the row."""
    row = Row(name.library, name.name, seed=seed, versions=versions)
    started = time.process_time()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            specimen = construct(name, seed=seed, limits=limits)
            describe(row, specimen)
            check_specimen(row, specimen, seed)
        except Exception as error:
            row.outcome = "error"
            row.reason = f"{type(error).__name__}: {_first_line(error)} ({_place(error)})"
    row.seconds = round(time.process_time() - started, 2)
    return row


def describe(row: Row, specimen: Specimen) -> None:
    """Fill in what is known before wrapping."""
    row.class_name = specimen.class_name
    row.module = specimen.module
    row.parameters = specimen.parameters
    row.shrunken = specimen.shrunken
    row.image_size = specimen.image_size
    row.classifier = "own" if specimen.has_classifier else "given"


def check_specimen(row: Row, specimen: Specimen, seed: int = 0) -> None:
    """Wrap an instance and run every check; fills in the row."""
    model = specimen.model
    images = specimen.images(seed + 2)
    generator = torch.Generator().manual_seed(seed + 3)
    model.eval()
    with torch.no_grad():
        output = model(images)
    head = None
    try:
        if not specimen.has_classifier:
            row.checks["asks for a head"] = _bare_error(specimen)
            head = _head_for(output, generator)
        original = _original_logits(output, head, specimen)
        in_use = parameters_in_use(model, images, head)
        model.eval()
        wrapped = _wrap(specimen, head)
    except ShapwrapError as error:
        row.outcome = "refused"
        row.reason = f"{type(error).__name__}: {error}"
        return
    report = wrapped.report()
    row.masking, row.readout, row.grid = report.masking, report.readout, report.grid
    row.note = report.note
    row.exact = report.exact
    _disturb_new_head(wrapped, head, generator)
    check_sums(row, wrapped, images)
    check_leak(row, wrapped, images, generator)
    check_logits(row, wrapped, images, original)
    check_other_size(row, wrapped, specimen, seed + 4)
    check_gradients(row, wrapped, images, in_use, generator)
    check_step(row, wrapped, images, generator)
    if row.library == "open_clip":
        wrapped.unwrap()
        model.eval()
        width = embedding_of(model, output).shape[1]
        check_similarities(row, specimen, images, width, generator)
    failures = row.failures()
    row.outcome = "failed" if failures else "wraps"
    row.reason = "; ".join(failures)


def _bare_error(specimen: Specimen) -> str:
    """An encoder without a head must ask for one."""
    try:
        ShapleyWrapper(specimen.model, image_size=specimen.image_size)
    except MissingHeadError:
        return passed_if(True, "")
    except ShapwrapError as error:
        # Refused for another reason; with a head it will be so again, and the row says why.
        return passed_if(False, f"{type(error).__name__} instead of MissingHeadError")
    return "wraps without a classifier"


def _head_for(output: object, generator: torch.Generator) -> nn.Linear | None:
    """A random classifier of what the encoder pools; None where it returns anything else."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        return None
    head = nn.Linear(output.shape[1], NUM_CLASSES)
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * output.shape[1] ** -0.5)
    return head.to(output.dtype)


def _original_logits(output: object, head: nn.Module | None, specimen: Specimen) -> Tensor | None:
    if not isinstance(output, Tensor) or output.ndim != 2:
        return None
    if specimen.has_classifier:
        return output
    with torch.no_grad():
        return None if head is None else head(output)


def _wrap(specimen: Specimen, head: nn.Module | None) -> ShapleyWrapper:
    new = not specimen.has_classifier and head is None
    return ShapleyWrapper(
        specimen.model,
        image_size=specimen.image_size,
        head=head,
        num_classes=NUM_CLASSES if new else None,
    )


@torch.no_grad()
def _disturb_new_head(
    wrapped: ShapleyWrapper, head: nn.Module | None, generator: torch.Generator
) -> None:
    """A head made by the wrapper is all zero, and so would be all that is checked."""
    parameters = wrapped.head_parameters()
    if head is None and all(not parameter.any() for parameter in parameters):
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _place(error: Exception) -> str:
    """File and function in which it was raised, after the last ones of shapwrap."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "shapwrap" in Path(frame.filename).parts]
    shown = dict.fromkeys(f"{Path(f.filename).name}:{f.name}" for f in (*own[-1:], *frames[-1:]))
    return ", ".join(shown)
