"""Figures of a comparison: maps of every method on the same images, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shapwrap.backbones.base import Normalization
from shapwrap.comparison.results import MethodRow
from shapwrap.errors import ArgumentError, MissingDependencyError
from shapwrap.explanation import Explanation
from shapwrap.plotting import check_drawable, save_figure, true_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

FOR, AGAINST = (0.70, 0.09, 0.17), (0.13, 0.40, 0.67)
"""Ends of the diverging scale, red and blue, told apart without red-green vision too."""

CURVES = {
    "aopc": ("share of cells removed", "drop of probability"),
    "log_odds": ("share of cells removed", "change of log-probability"),
    "insertion": ("share of cells inserted", "probability"),
    "deletion": ("share of cells deleted", "probability"),
}


PANELS = {"aopc": "AOPC", "log_odds": "LOdds"}


class Strip(NamedTuple):
    """The maps of one method."""

    title: str
    maps: Tensor
    """[rows, H, W]."""
    limit: float
    """Of the colour scale; stronger values have the colour of the limit."""
    classes: Sequence[str] = ()
    """The class that each map explains; none if left out."""

    @classmethod
    def of(cls, title: str, maps: Tensor, classes: Sequence[str] = ()) -> "Strip":
        """With a limit that 0.5 % of the pixels exceed: few pixels would blacken all others."""
        magnitudes = maps.abs().flatten().sort().values
        limit = magnitudes[int(0.995 * (len(magnitudes) - 1))]
        return cls(title, maps, float(limit) or float(magnitudes[-1]) or 1.0, classes)


def map_grid(
    images: Tensor,
    labels: Sequence[str],
    strips: Sequence[Strip],
    *,
    width: float | None = None,
) -> "Figure":
    """A figure with images as rows and methods as columns.

    Colours diverge around 0, red for the class and blue against it. A method has one scale for all
    its images, drawn below its column: units differ between methods, so scales must. Zero leaves
    the pale picture as it is, and colour grows evenly with the value. A map of another class than
    that of the image says so.

    Args:
        images: Float [rows, 3, H, W] in [0, 1].
        labels: What stands above each image: its class.
        strips: One a method.
        width: In inches; by default 1.25 a column.

    Raises:
        ArgumentError: A width that is not positive.
        MissingDependencyError: matplotlib is not installed.
    """
    if width is not None and not width > 0:
        raise ArgumentError(f"width is {width}; expected a positive number of inches.")
    figure_class = _figure_class()
    rows, columns = len(images), len(strips) + 1
    aspect = images.shape[-2] / images.shape[-1]
    cell = 1.25 if width is None else (width - 0.2) / columns
    figure = figure_class(
        figsize=(width or cell * columns + 0.2, (cell * aspect + 0.18) * rows + 0.45),
        layout="constrained",
    )
    axes_of = figure.subplots(
        rows + 1, columns, squeeze=False, gridspec_kw={"height_ratios": [1.0] * rows + [0.06]}
    )
    for row in range(rows):
        axes_of[row][0].imshow(images[row].permute(1, 2, 0).numpy())
        axes_of[row][0].set_title(labels[row][:24], fontsize=6, pad=2)
        pale = 0.55 + 0.45 * images[row].mean(dim=0)
        for column, strip in enumerate(strips, start=1):
            axes = axes_of[row][column]
            axes.imshow(_coloured(strip.maps[row] / strip.limit, pale), interpolation="nearest")
            if row == 0:
                axes.set_title(strip.title, fontsize=6, pad=2)
            explained = strip.classes[row] if strip.classes else labels[row]
            if explained != labels[row]:
                axes.text(
                    0.03,
                    0.03,
                    f"as {explained[:20]}",
                    transform=axes.transAxes,
                    fontsize=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
                )
    for axes in figure.axes:
        axes.set_axis_off()
    _scales(axes_of[rows][1:], strips)
    return figure


def figure_of_methods(
    explanations: Mapping[str, Explanation],
    images: Tensor,
    *,
    normalization: Normalization | None = None,
    shared_scale: bool = False,
    width: float | None = None,
) -> "Figure":
    """A figure of the same images explained by several methods, one column a method.

    Args:
        explanations: From titles to explanations of these images.
        images: What was explained, [B, C, H, W], normalised.
        normalization: Of the channels; by default what the first explanation says.
        shared_scale: One scale of colours for all methods, for those whose values have one unit.
        width: In inches: 3.25 for a column of a paper, 6.9 for its page.

    Raises:
        ArgumentError: No explanation, or a width that is not positive.
        ImageError: An explanation of other images.
        PlotError: The true colours cannot be told.
        MissingDependencyError: matplotlib is not installed.
    """
    if not explanations:
        raise ArgumentError("there is no explanation; expected at least one method.")
    first = next(iter(explanations.values()))
    for explanation in explanations.values():
        check_drawable(explanation, images, explanation.class_names)
    pictures = true_colors(images.detach().float().cpu(), normalization or first.normalization)
    if pictures.shape[1] != 3:
        pictures = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    strips = [
        Strip.of(title, explanation.heatmap().detach().float().cpu(), _targets(explanation))
        for title, explanation in explanations.items()
    ]
    if shared_scale:
        limit = max(strip.limit for strip in strips)
        strips = [strip._replace(limit=limit) for strip in strips]
    return map_grid(pictures, _targets(first), strips, width=width)


def _targets(explanation: Explanation) -> list[str]:
    names = explanation.class_names
    classes = explanation.target.tolist()
    return [str(names[k]) if names is not None else f"class {k}" for k in classes]


def _coloured(share: Tensor, pale: Tensor) -> "NDArray[Any]":
    """A pale picture [H, W] under values in units of the limit, as colours [H, W, 3]."""
    share = share.clamp(-1, 1)[..., None]
    color = torch.where(share > 0, torch.tensor(FOR), torch.tensor(AGAINST))
    return torch.lerp(pale[..., None].expand_as(color), color, share.abs()).numpy()


def _scales(axes_of: Sequence[Any], strips: Sequence[Strip]) -> None:
    """Below each column what its colours mean, on white."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("against and for", [AGAINST, (1, 1, 1), FOR])
    for axes, strip in zip(axes_of, strips, strict=True):
        axes.set_axis_on()
        axes.imshow(
            torch.linspace(-1, 1, 256)[None].numpy(),
            cmap=colors,
            aspect="auto",
            extent=(-1, 1, 0, 1),
        )
        axes.set_yticks([])
        axes.set_xticks([-1, 0, 1], [f"−{strip.limit:.2g}", "0", f"{strip.limit:.2g}"], fontsize=5)
        axes.tick_params(length=1.5, width=0.4, pad=1)
        for spine in axes.spines.values():
            spine.set_linewidth(0.3)


def curve_figure(
    rows: Sequence[MethodRow], metrics: Sequence[str], *, several_models: bool = False
) -> "Figure | None":
    """Curves of all methods, one panel a curve, with a band of one standard error.

    None where no metric has any.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    names = dict.fromkeys(
        (metric, name)
        for row in rows
        for metric in metrics
        if metric in row.metrics
        for name in row.metrics[metric].curves
    )
    if not names:
        return None
    figure = _figure_class()(
        figsize=(3.4 * len(names) + 1.4, max(2.9, 0.17 * len(rows))), layout="constrained"
    )
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colors = _colors(len(rows))
    for axes, (metric, name) in zip(panels, names, strict=True):
        for row, color in zip(rows, colors, strict=True):
            curve = row.metrics[metric].curves.get(name) if metric in row.metrics else None
            if curve is None:
                continue
            x, y, error = (torch.tensor(curve[part]) for part in ("x", "y", "error"))
            label = f"{row.model}: {row.method}" if several_models else row.method
            axes.plot(x.numpy(), y.numpy(), color=color, linewidth=1.1, label=label)
            if not error.isnan().any():
                axes.fill_between(
                    x.numpy(),
                    (y - error).numpy(),
                    (y + error).numpy(),
                    color=color,
                    alpha=0.15,
                    linewidth=0,
                )
        across, up = CURVES.get(name, ("share of cells", name))
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
        title = PANELS.get(name, name.replace("_", " "))
        alike = sum(1 for _, other in names if other == name) > 1
        axes.set_title(f"{title}\n{metric}" if alike else title, fontsize=9)
        axes.tick_params(labelsize=7)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", fontsize=7, frameon=False
    )
    return figure


def save(figure: "Figure", path: Path) -> None:
    """`path`.pdf, with text and lines as vectors, and `path`.png."""
    for suffix in ("pdf", "png"):
        save_figure(figure, path.with_name(f"{path.name}.{suffix}"))


def _colors(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    table = colormaps["tab10" if count <= 10 else "tab20"]
    return [table(index % table.N) for index in range(count)]


def _figure_class() -> "type[Figure]":
    try:
        # Figure alone: pyplot would keep every figure alive and choose a window system.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures need matplotlib; run: pip install 'shapwrap[plot]'"
        ) from error
    return Figure
