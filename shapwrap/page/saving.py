"""An explanation as a file, of the kind that its suffix names."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shapwrap.audit import Audit
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation
from shapwrap.page.report import report_page
from shapwrap.plotting import save_figure

FIGURES = (".pdf", ".svg", ".png")


def save_explanation(
    explanation: Explanation,
    path: str | Path,
    images: Tensor,
    *,
    audit: Audit | None,
    normalization: Normalization | tuple[Sequence[float], Sequence[float]] | None,
    class_names: Sequence[str] | None,
    captions: Sequence[str] | None,
    title: str,
    width: float,
) -> Path:
    """See `Explanation.save`.

    Raises:
        ArgumentError: Another suffix, or captions or an audit of other images.
        ImageError: The images are not those that were explained.
        PlotError: The true colours cannot be told.
        MissingDependencyError: matplotlib is not installed, which figures need.
    """
    if not isinstance(path, str | Path):
        raise ArgumentError(f"path is {type(path).__name__}; expected a path or its string.")
    path = Path(path)
    kind = path.suffix.lower()
    if kind in FIGURES:
        figure = explanation.plot(
            images,
            normalization=normalization,
            class_names=class_names,
            max_images=len(images),
            width=width,
        )
        save_figure(figure, path)
        return path
    if kind != ".html":
        raise ArgumentError(
            f"path is {str(path)!r}, whose suffix is {path.suffix!r}; expected .html for a page, "
            f"or {', '.join(FIGURES)} for a figure."
        )
    statistics = Normalization(*map(tuple, normalization)) if normalization else None
    page = report_page(
        explanation,
        images,
        audit=audit,
        normalization=statistics or explanation.normalization,
        class_names=class_names or explanation.class_names,
        captions=captions,
        title=title,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
