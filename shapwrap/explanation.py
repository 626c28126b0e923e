"""The explanation of a batch of images: values, heat maps, a check, a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Logits, PatchValues
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError, TargetError
from shapwrap.masking.pixels import fitted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from shapiq import InteractionValues

    from shapwrap.audit import Audit


@dataclass(frozen=True)
class Explanation:
    """What each patch contributed to one class of each image, in logits."""

    values: Float[Tensor, "batch patches"]
    """phi_n of the target class, row by row over the grid. Their sum is the logit minus the
    baseline (minus the mean logit of all classes, with `contrast`)."""
    logits: Logits
    """f(x), all classes."""
    target: Int[Tensor, " batch"]
    """The class explained, one an image."""
    grid: Grid
    """Rows and columns of patches."""
    image_size: tuple[int, int]
    """Height and width of the images, in pixels."""
    contrast: bool = False
    """Whether the mean over classes was taken off."""
    class_names: Sequence[str] | None = None
    """Names of the classes, where known."""
    normalization: Normalization | None = None
    """Pixel statistics, where known, to draw images in their true colours."""
    baseline: float | Tensor = 0.0
    """v of the empty coalition, a number or [K]."""
    covered: tuple[int, int] | None = None
    """Height and width over which the patches lie, from the upper left corner, where that is not
    the image: pixels beyond are read by no patch."""
    method: str = "shapley"
    """What made the values."""
    pixels: Float[Tensor, "batch height width"] | None = None
    """Values of single pixels, for a method that has them; `values` are their sums."""
    total: Float[Tensor, " batch"] | None = None
    """What the values must sum to, where that is not the logit minus the baseline; NaN for a method
    that claims no sum, whose values have a unit of their own."""
    all_values: PatchValues | None = None
    """phi of every class, where asked for with `all_classes=True`; `values` is the target's."""
    unit: str = "logit"
    """Of values and logits: "logit", or "similarity" where the classes are texts."""

    def heatmap(self, size: tuple[int, int] | None = None) -> Float[Tensor, "batch height width"]:
        """The values as maps, [B, H, W], in logits a patch, or a pixel where pixels have values.

        Bilinear between the centres of patches. Reading values off is what it is for: a sum over
        pixels means nothing, `values` is what sums to the logit minus the baseline.

        Args:
            size: Height and width in pixels; by default those of the images.

        Raises:
            ArgumentError: A size below 1.
        """
        size = self.image_size if size is None else size
        if not isinstance(size, tuple | list) or len(size) != 2 or min(size) < 1:
            raise ArgumentError(f"size is {size}; expected (height, width), both at least 1.")
        if self.pixels is not None:
            drawn = functional.interpolate(
                self.pixels[:, None], size=tuple(size), mode="bilinear", align_corners=False
            )
            return drawn[:, 0]
        maps = rearrange(self.values, "b (rows columns) -> b 1 rows columns", rows=self.grid[0])
        covered = self.covered or self.image_size
        (height, width), (rows, columns) = self.image_size, covered
        scaled = (round(rows * size[0] / height), round(columns * size[1] / width))
        drawn = functional.interpolate(maps, size=scaled, mode="bilinear", align_corners=False)
        return fitted(drawn, (size[0], size[1]), fill=0.0)[:, 0]

    def explained(self) -> Float[Tensor, " batch"]:
        """What the values must sum to: the logit of the target, minus baseline and contrast."""
        if self.total is not None:
            return self.total
        gains = self.logits - self.baseline
        explained = gains.gather(1, self.target[:, None])[:, 0]
        return explained - gains.mean(dim=1) if self.contrast else explained

    def efficiency_gap(self) -> Float[Tensor, " batch"]:
        """|sum of values - what they must sum to|, in logits: rounding error, for every readout.

        NaN for a compared method that does not claim any sum.
        """
        return (self.values.sum(dim=1) - self.explained()).abs()

    def plot(
        self,
        images: Tensor,
        *,
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] | None = None,
        class_names: Sequence[str] | None = None,
        max_images: int = 8,
        width: float = 9.0,
        limit: float | None = None,
    ) -> "Figure":
        """A matplotlib figure: image, heat map and overlay, one row an image.

        Colours diverge around 0, red for the class and blue against it, on one scale for all rows.

        Args:
            images: What was explained, [B, C, H, W], normalised.
            normalization: Mean and standard deviation of the channels, to undo; by default those
                of the model.
            class_names: By default those of the model, where known.
            max_images: Rows at the most.
            width: Of the figure in inches: 3.25 for a column of a paper, 6.9 for its page.
            limit: Value of the strongest colour, to share a scale with other figures; by default
                the largest value of these images.

        Raises:
            PlotError: The true colours cannot be told.
            ArgumentError: A width or limit that is not positive.
            MissingDependencyError: matplotlib is not installed.
        """
        from shapwrap.plotting import plot_explanation

        statistics = Normalization(*map(tuple, normalization)) if normalization else None
        return plot_explanation(
            self,
            images,
            normalization=statistics or self.normalization,
            class_names=class_names or self.class_names,
            max_images=max_images,
            width=width,
            limit=limit,
        )

    def save(
        self,
        path: str | Path,
        images: Tensor,
        *,
        audit: "Audit | None" = None,
        normalization: Normalization | tuple[Sequence[float], Sequence[float]] | None = None,
        class_names: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
        title: str = "Patch values",
        width: float = 9.0,
    ) -> Path:
        """The file written: a page to explore (.html), or the figure of `plot` (.pdf, .svg, .png).

        The page is one file that needs no network. It shows one class an image, or, explained with
        `all_classes=True`, every class.

        Args:
            path: Where to; folders are made, a file that is there is replaced.
            images: What was explained, [B, C, H, W], normalised.
            audit: `wrapped.audit(images)`, for the page to say how far the values can be trusted.
            normalization: As in `plot`.
            class_names: As in `plot`.
            captions: What to call each image on the page, for example its file name.
            title: Of the page.
            width: Of the figure in inches, as in `plot`.

        Raises:
            ArgumentError: Another suffix, or captions or an audit of other images.
            ImageError: Not the images that were explained.
            PlotError: The true colours cannot be told.
            MissingDependencyError: matplotlib is not installed, which figures need.
        """
        from shapwrap.page.saving import save_explanation

        return save_explanation(
            self,
            path,
            images,
            audit=audit,
            normalization=normalization,
            class_names=class_names,
            captions=captions,
            title=title,
            width=width,
        )

    def to_shapiq(self) -> "list[InteractionValues]":
        """One `shapiq.InteractionValues` an image: Shapley values of its patches, and the baseline.

        Raises:
            ArgumentError: An explanation by another method than that of a wrapped model.
            MissingDependencyError: shapiq is not installed.
        """
        from shapwrap.interop.shapiq import interaction_values

        return interaction_values(self)


def check_target(target: object, logits: Logits) -> Int[Tensor, " batch"]:
    """The class to explain for each image: given, or predicted.

    Raises:
        TargetError: Out of range, or not one class an image.
    """
    batch, num_classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    try:
        classes = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError) as error:
        raise TargetError(
            f"target is {target!r}; expected class indices, an int or int64 [B]."
        ) from error
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TargetError(f"target is {target!r}; expected class indices, an int or int64 [B].")
    classes = classes.long()
    if classes.ndim == 0:
        classes = classes.expand(batch)
    if classes.shape != (batch,):
        raise TargetError(
            f"target has shape {tuple(classes.shape)}; expected one class index, or one for each "
            f"of the {batch} images."
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise TargetError(
            f"target has values from {int(classes.min())} to {int(classes.max())}; this model has "
            f"classes 0 to {num_classes - 1}."
        )
    return classes
