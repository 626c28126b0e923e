"""Figures: image, heat map and overlay, in true colours and on one scale."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError, ImageError, MissingDependencyError, PlotError
from shapwrap.explanation import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR_MAP = "RdBu_r"


def plot_explanation(
    explanation: Explanation,
    images: Tensor,
    *,
    normalization: Normalization | None,
    class_names: Sequence[str] | None,
    max_images: int,
    width: float = 9.0,
    limit: float | None = None,
) -> "Figure":
    """See `Explanation.plot`.

    Raises:
        ImageError: The images are not those that were explained.
        PlotError: The true colours cannot be told.
        ArgumentError: A width or limit that is not positive.
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        # Figure alone: pyplot would keep every figure alive and choose a window system.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures need matplotlib; run: pip install 'shapwrap[plot]'"
        ) from error
    check_drawable(explanation, images, class_names)
    for name, number in (("width", width), ("limit", 1.0 if limit is None else limit)):
        if not 0 < number < math.inf:
            raise ArgumentError(f"{name} is {number}; expected a positive number.")
    rows = min(len(images), max(1, max_images))
    pixels = true_colors(images[:rows].detach().float().cpu(), normalization)
    maps = explanation.heatmap()[:rows].detach().float().cpu()
    limit = limit or float(explanation.values[:rows].abs().max()) or 1.0
    aspect = explanation.image_size[0] / explanation.image_size[1]
    height = 0.32 * width * aspect * rows + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    text = min(9.0, max(5.0, 1.6 * width))
    grid_of_axes = figure.subplots(rows, 3, squeeze=False)
    what = "value minus class mean" if explanation.contrast else "value"
    drawn = None
    for row, (image_axes, map_axes, overlay_axes) in enumerate(grid_of_axes):
        colors = {"cmap": COLOR_MAP, "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        _show(image_axes, pixels[row])
        image_axes.set_title(_title(explanation, row, class_names), fontsize=text)
        drawn = map_axes.imshow(maps[row].numpy(), **colors)
        map_axes.set_title(f"{what} ({explanation.unit} a patch)", fontsize=text)
        _show(overlay_axes, pixels[row].mean(dim=0, keepdim=True) * 0.8 + 0.1)
        # Weak values leave the picture visible, strong ones colour it.
        opacity = (maps[row].abs() / limit).sqrt().clamp(0, 1) * 0.75
        overlay_axes.imshow(maps[row].numpy(), alpha=opacity.numpy(), **colors)
        overlay_axes.set_title("overlay", fontsize=text)
        for axes in (image_axes, map_axes, overlay_axes):
            axes.set_axis_off()
    if drawn is not None:
        scale = figure.colorbar(drawn, ax=grid_of_axes[:, 2].tolist(), shrink=0.8)
        scale.ax.tick_params(labelsize=text)
    return figure


def save_figure(figure: "Figure", path: Path, *, dpi: int = 200) -> None:
    """The figure as a file of the suffix's kind: text and lines as vectors in .pdf and .svg.

    Fonts are embedded, in PDF as TrueType, which publishers ask for; in SVG as outlines.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "path"}):
        figure.savefig(path, dpi=dpi)


def check_drawable(
    explanation: Explanation, images: Tensor, class_names: Sequence[str] | None
) -> None:
    """Raise unless these are the images that were explained, with one name a class.

    Raises:
        ImageError: Other images.
        PlotError: Another number of names.
    """
    expected = (len(explanation.values), *explanation.image_size)
    if images.ndim != 4 or (images.shape[0], *images.shape[-2:]) != expected:
        raise ImageError(
            f"images have shape {tuple(images.shape)}; expected the {expected[0]} images of "
            f"{expected[1]} x {expected[2]} pixels that were explained."
        )
    if class_names is not None and len(class_names) != explanation.logits.shape[1]:
        raise PlotError(
            f"class_names has {len(class_names)} names; expected one for each of the "
            f"{explanation.logits.shape[1]} classes."
        )


def true_colors(
    images: Float[Tensor, "batch channels height width"], normalization: Normalization | None
) -> Float[Tensor, "batch channels height width"]:
    """Pixels in [0, 1], the normalisation undone.

    Raises:
        PlotError: Without statistics the pixels are outside [0, 1].
    """
    if normalization is not None:
        if len(normalization.mean) != images.shape[1]:
            raise PlotError(
                f"normalization has {len(normalization.mean)} channels, the images "
                f"{images.shape[1]}; pass normalization=(mean, std) with one number a channel."
            )
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in normalization)
        images = images * std + mean
    elif images.min() < 0 or images.max() > 1:
        raise PlotError(
            f"pixels range from {float(images.min()):.2g} to {float(images.max()):.2g} and the "
            "model does not tell its statistics; pass normalization=(mean, std) to plot."
        )
    return images.clamp(0, 1)


def _show(axes: "Axes", pixels: Float[Tensor, "channels height width"]) -> None:
    if pixels.shape[0] == 3:
        axes.imshow(pixels.permute(1, 2, 0).numpy())
    else:
        axes.imshow(pixels.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)


def _title(explanation: Explanation, row: int, class_names: Sequence[str] | None) -> str:
    target = int(explanation.target[row])
    name = class_names[target] if class_names is not None else f"class {target}"
    # A longer name would run over its neighbours.
    name = name if len(name) <= 28 else f"{name[:27]}…"
    score = float(explanation.logits[row, target])
    # Similarities are small numbers.
    return f"{name}: {explanation.unit} {score:.{2 if explanation.unit == 'logit' else 3}f}"
