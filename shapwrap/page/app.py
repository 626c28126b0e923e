"""A local page that explains what is dropped on it."""

import html
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shapwrap.backbones.base import Normalization
from shapwrap.clip import ShapleyCLIP
from shapwrap.errors import ArgumentError, MissingDependencyError, ShapwrapError
from shapwrap.wrapper import ShapleyWrapper

if TYPE_CHECKING:
    from gradio import Blocks

PICTURE_TEXTS = "a photo of a person\na photo of an animal\na photo of a building"


class Answer(NamedTuple):
    """What the page shows of one image."""

    sentence: str
    """The prediction in a line of text."""
    report: str
    """The page of `Explanation.save`."""


class ImageExplainer:
    """From a picture, and texts where the model reads them, to the page of its explanation.

    Args:
        wrapped: The model; its modes stay as they are.
        transform: From a PIL image to a normalised tensor [C, H, W].
        normalization: Pixel statistics of the transform; by default those of the model.
    """

    def __init__(
        self,
        wrapped: ShapleyWrapper | ShapleyCLIP,
        transform: Callable[[Any], Tensor],
        *,
        normalization: Normalization | None = None,
    ):
        self.reads_texts = isinstance(wrapped, ShapleyCLIP)
        self._wrapped = wrapped
        self._transform = transform
        self._normalization = normalization

    def __call__(
        self,
        picture: Any,
        texts: str = "",
        *,
        contrast: bool = True,
        coalitions: int = 0,
    ) -> Answer:
        """Prediction and page.

        Args:
            picture: A PIL image.
            texts: One a line, for a model of images and texts.
            contrast: Take the mean over classes off, where there are several.
            coalitions: Of the audit, an even number; 0 leaves it out.

        Raises:
            ArgumentError: No picture, or no texts where they are read.
            ShapwrapError: What the model says of the image.
        """
        if picture is None:
            raise ArgumentError("there is no picture; drop one on the page first.")
        device = next(self._wrapped.parameters()).device
        images = self._transform(picture)[None].to(device)
        audit = None
        if isinstance(self._wrapped, ShapleyCLIP):
            lines = [line.strip() for line in texts.splitlines() if line.strip()]
            if not lines:
                raise ArgumentError("there is no text; write one a line.")
            explanation = self._wrapped.explain(
                images, lines, pairs="best", contrast=contrast and len(lines) > 1, all_classes=True
            )
            if coalitions:
                audit = self._wrapped.audit(images, lines, num_coalitions=coalitions)
        else:
            several = self._wrapped.num_classes > 1
            explanation = self._wrapped.explain(
                images, contrast=contrast and several, all_classes=True
            )
            if coalitions:
                audit = self._wrapped.audit(images, num_coalitions=coalitions)
        target = int(explanation.target[0])
        names = explanation.class_names
        name = names[target] if names is not None else f"class {target}"
        score = float(explanation.logits[0, target])
        sentence = f"{name}, {explanation.unit} {score:.3f}"
        with tempfile.TemporaryDirectory() as folder:
            path = explanation.save(
                Path(folder) / "report.html",
                images,
                audit=audit,
                normalization=self._normalization,
                captions=["Your picture"],
                title=sentence,
            )
            return Answer(sentence, path.read_text(encoding="utf-8"))


def build_app(
    explain: ImageExplainer, *, title: str = "shapwrap", coalitions: int = 32
) -> "Blocks":
    """A gradio page around `explain`; `serve_app` starts it. It sends no telemetry.

    Args:
        explain: What is behind the page.
        title: Of the page.
        coalitions: Of the audit, where the visitor asks for it.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    try:
        import gradio
        from gradio.utils import get_upload_folder
    except ImportError as error:
        raise MissingDependencyError(
            "the page needs gradio; run: pip install 'shapwrap[serve]'"
        ) from error

    def answer(picture: Any, texts: str, contrast: bool, measured: bool) -> tuple[str, str, str]:
        try:
            with torch.no_grad():
                found = explain(
                    picture,
                    texts or "",
                    contrast=contrast,
                    coalitions=coalitions if measured else 0,
                )
        except ShapwrapError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        # gradio deletes it with its own files of the session.
        folder = Path(tempfile.mkdtemp(dir=uploads))
        saved = folder / "report.html"
        saved.write_text(found.report, encoding="utf-8")
        return found.sentence, _frame(found.report), str(saved)

    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    with _environment_kept():
        blocks = gradio.Blocks(
            title=title, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
        )
    with blocks as app:
        gradio.Markdown(f"# {html.escape(title)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                picture = gradio.Image(type="pil", label="Picture", sources=["upload", "clipboard"])
                texts = gradio.Textbox(
                    value=PICTURE_TEXTS if explain.reads_texts else "",
                    label="Texts, one a line",
                    lines=4,
                    visible=explain.reads_texts,
                )
                contrast = gradio.Checkbox(value=True, label="Compare with the mean of all classes")
                measured = gradio.Checkbox(
                    value=False, label=f"Measure the skill ({coalitions} more passes)"
                )
                button = gradio.Button("Explain", variant="primary")
                sentence = gradio.Textbox(label="Prediction", interactive=False)
                saved = gradio.DownloadButton("Save this explanation")
            with gradio.Column(scale=3):
                shown = gradio.HTML(label="Explanation")
        inputs, outputs = [picture, texts, contrast, measured], [sentence, shown, saved]
        button.click(answer, inputs, outputs, api_name="explain")
    return app


def serve_app(app: "Blocks", *, port: int, block: bool = True) -> str:
    """Starts the page on 127.0.0.1, for this machine alone; returns its address.

    Args:
        app: Of `build_app`.
        port: 0 takes a free one.
        block: Return only when it is stopped.

    Raises:
        ArgumentError: The port is taken.
    """
    from gradio.themes import Base

    # The default theme asks a server for its fonts.
    theme = Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = app.launch(
            server_name="127.0.0.1",
            server_port=port or _free_port(),
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=not block,
            theme=theme,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
        )
    except OSError as error:
        raise ArgumentError(f"port {port} cannot be used ({error}); choose another.") from error
    return address


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Where gradio is told to be silent, it sets a variable that other libraries read too."""
    name = "HF_HUB_DISABLE_TELEMETRY"
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _frame(report: str) -> str:
    """The page within a page, whose scripts reach nothing outside it."""
    return (
        '<iframe title="Explanation" sandbox="allow-scripts" '
        'style="width:100%;height:1100px;border:0;border-radius:8px" '
        f'srcdoc="{html.escape(report)}"></iframe>'
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
