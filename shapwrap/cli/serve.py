"""`shapwrap serve`: a local page that explains dropped images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shapwrap.cli.run_folder import load_run
from shapwrap.data.folder import image_transform
from shapwrap.page.app import ImageExplainer, build_app, serve_app

console = Console(highlight=False)


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="Of save_pretrained, or --out of 'train'.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
) -> None:
    """Start a page on 127.0.0.1 that explains the images dropped on it. Ctrl-C ends it."""
    app = build_app(load_explainer(checkpoint), title=f"shapwrap: {checkpoint.resolve().name}")
    address = serve_app(app, port=port, block=False)
    console.print(f"{address} (this machine only; Ctrl-C ends it)", soft_wrap=True)
    app.block_thread()


def load_explainer(checkpoint: Path) -> ImageExplainer:
    """What a folder holds, ready for a page.

    Raises:
        SavedModelError: The folder does not hold a saved model, or it is damaged.
        ArgumentError: The settings of its run are damaged.
    """
    normalization, wrapped = load_run(checkpoint)
    transform = image_transform(wrapped.image_size, normalization, augment=False)
    return ImageExplainer(wrapped, transform, normalization=normalization)
