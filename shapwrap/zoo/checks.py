"""What must hold for every wrapped model, checked through the public API alone."""

import torch
from torch import Tensor

from shapwrap.errors import ImageError, ImageTypeError
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.zoo.construct import Specimen
from shapwrap.zoo.row import PASSED, Row

SUM_TOLERANCE = 5e-5
"""Of sums of patch values in float32, relative to the largest logit: single rounding is 6e-8, and
the terms of a sum may be a hundred times larger than it."""
VALUE_TOLERANCE = 1e-4
"""Between v(full) and the logits: a masked pass uses other kernels than a plain one."""
LOGIT_TOLERANCE = 1e-4
"""Of logits that the report says are the original model's."""
SMALLEST_RESPONSE = 1e-4
"""Logits that hardly differ between two images of noise would let every other check pass."""


def passed_if(holds: bool, otherwise: str) -> str:
    """The word for success, or what went wrong."""
    return PASSED if holds else otherwise


def relative(difference: Tensor, logits: Tensor) -> float:
    """Largest absolute entry, relative to the largest logit; NaN where either is."""
    scale = logits.abs().max().clamp(min=1e-12)
    return float(difference.abs().max() / scale)


def mixed_coalitions(num_patches: int, generator: torch.Generator) -> Tensor:
    """A single patch, a third, all but one: bool [3, N], at random places."""
    sizes = torch.tensor([1, max(1, num_patches // 3), num_patches - 1])
    ranks = torch.rand(len(sizes), num_patches, generator=generator).argsort(1).argsort(1)
    return ranks < sizes[:, None]


def absent_pixels(
    coalitions: Tensor, grid: tuple[int, int], size: tuple[int, int], covered: tuple[int, int]
) -> Tensor:
    """Pixels of absent patches, bool [S, 1, H, W]: pixel row r lies in patch row floor(r h / H).

    H is the height that the patches cover. Pixels beyond belong to no patch, and are absent too.
    """
    rows = torch.arange(size[0]) * grid[0] // covered[0]
    columns = torch.arange(size[1]) * grid[1] // covered[1]
    patch = rows.clamp(max=grid[0] - 1)[:, None] * grid[1] + columns.clamp(max=grid[1] - 1)[None]
    beyond = (rows >= grid[0])[:, None] | (columns >= grid[1])[None]
    return ~coalitions[:, patch][:, None] | beyond


@torch.no_grad()
def check_sums(row: Row, wrapped: ShapleyWrapper, images: Tensor) -> None:
    """Efficiency, v(nobody) = 0, v(everybody) = logits - baseline, and the scale of the logits."""
    logits = wrapped(images)
    finite = bool(torch.isfinite(logits).all())
    row.checks["finite"] = passed_if(finite, "logits are not finite")
    difference = logits[0] - logits[1]
    row.checks["response"] = passed_if(
        relative(difference, logits) > SMALLEST_RESPONSE, "logits do not depend on the image"
    )
    phi = wrapped.attribute(images)
    expected = logits - wrapped.baseline
    row.efficiency_gap = relative(phi.sum(1) - expected, logits)
    row.checks["efficiency"] = passed_if(
        row.efficiency_gap <= SUM_TOLERANCE, f"gap {row.efficiency_gap:.2g}"
    )
    num_patches = phi.shape[1]
    ends = torch.zeros(len(images), 2, num_patches, dtype=torch.bool)
    ends[:, 1] = True
    values = wrapped.value(images, ends)
    row.checks["empty"] = passed_if(
        bool((values[:, 0] == 0).all()), f"v(empty) is {float(values[:, 0].abs().max()):.2g}"
    )
    gap = relative(values[:, 1] - expected, logits)
    row.checks["full"] = passed_if(gap <= VALUE_TOLERANCE, f"v(full) off by {gap:.2g}")


@torch.no_grad()
def check_leak(
    row: Row, wrapped: ShapleyWrapper, image: Tensor, generator: torch.Generator
) -> None:
    """v(s) does not change by one bit when pixels of absent patches do, alone and in a pair."""
    grid, size = wrapped.grid, (image.shape[-2], image.shape[-1])
    coalitions = mixed_coalitions(grid[0] * grid[1], generator)
    images = image[:1].repeat(len(coalitions), 1, 1, 1)
    noise = 100 * torch.randn(images.shape, generator=generator)
    covered = wrapped.explain(images[:1]).covered or size
    changed = torch.where(absent_pixels(coalitions, grid, size, covered), noise, images)
    ways = {"alone": coalitions[:, None]}
    if wrapped.report().masking == "token-removal":
        ways["in a pair"] = torch.stack((coalitions, ~coalitions), dim=1)
    for way, given in ways.items():
        before = wrapped.value(images, given)[:, 0]
        after = wrapped.value(changed, given)[:, 0]
        same = bool(torch.isfinite(before).all()) and torch.equal(before, after)
        row.checks[f"no leak {way}"] = passed_if(
            same, f"v(s) moved by {relative(before - after, before):.2g}"
        )
        moved = wrapped.value(images[:, :, :, :] * 0.5, given)[:, 0]
        row.checks[f"present pixels matter {way}"] = passed_if(
            not torch.equal(before, moved), "v(s) does not depend on present pixels"
        )


@torch.no_grad()
def check_logits(
    row: Row, wrapped: ShapleyWrapper, images: Tensor, original: Tensor | None
) -> None:
    """Logits against those of the original model; they must agree where the report says so."""
    if original is None:
        return
    logits = wrapped(images)
    if logits.shape != original.shape:
        row.checks["logits"] = f"shape {tuple(logits.shape)}, original {tuple(original.shape)}"
        return
    row.logit_difference = relative(logits - original, original)
    within = row.logit_difference <= LOGIT_TOLERANCE
    row.checks["logits"] = passed_if(
        within or not row.exact,
        f"report claims the original logits, off by {row.logit_difference:.2g}",
    )


@torch.no_grad()
def check_other_size(row: Row, wrapped: ShapleyWrapper, specimen: Specimen, seed: int) -> None:
    """Efficiency on wider images; a typed refusal is right where the model has one size."""
    height, width = specimen.image_size
    cell = max(1, width // wrapped.grid[1])
    images = specimen.images(seed, (height, width + 2 * cell), batch=1)
    try:
        phi = wrapped.attribute(images)
        logits = wrapped(images)
        num_patches = wrapped.patches_of(images)
    except (ImageError, ImageTypeError) as error:
        row.other_size = f"refused: {type(error).__name__}"
        return
    gap = relative(phi.sum(1) - (logits - wrapped.baseline), logits)
    explanation = wrapped.explain(images)
    row.other_size = (
        f"{explanation.grid[0]} x {explanation.grid[1]} at {height} x {width + 2 * cell}"
    )
    row.checks["other size"] = passed_if(
        gap <= SUM_TOLERANCE and num_patches == phi.shape[1], f"gap {gap:.2g}"
    )
