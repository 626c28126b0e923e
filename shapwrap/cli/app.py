"""Commands: inspect, demo, train, explain, serve, compare, zoo."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from shapwrap._version import __version__
from shapwrap.cli import demo as demonstration
from shapwrap.cli.compare import compare
from shapwrap.cli.explain_images import explain_images
from shapwrap.cli.run_folder import ModelSettings, build_model, wrap_model
from shapwrap.cli.serve import serve
from shapwrap.cli.train_folder import TrainRequest, train_folder
from shapwrap.cli.zoo import zoo
from shapwrap.errors import ArgumentError, ShapwrapError

app = typer.Typer(
    help="Wrap a pretrained vision model so that it explains itself.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False)

Size = Annotated[
    str | None, typer.Option(help="Pixels: one number, or HEIGHTxWIDTH.", metavar="SIZE")
]
GridOption = Annotated[
    str | None, typer.Option(help="Patch grid: one number, or ROWSxCOLUMNS.", metavar="GRID")
]
Name = Annotated[str, typer.Argument(help="timm name, or torchvision:NAME.")]


def run() -> None:
    """Run the command; an error that a user caused is one line, not a traceback."""
    try:
        app()
    except ShapwrapError as error:
        print(f"shapwrap: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Wrap a pretrained vision model so that it explains itself."""


@app.command()
def inspect(
    model: Name,
    image_size: Size = None,
    grid: GridOption = None,
    num_classes: Annotated[int | None, typer.Option(help="Replace the classifier.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the model.")] = None,
) -> None:
    """Print how a model is wrapped: masking, readout, grid, cost, and what to know before use."""
    settings = ModelSettings(model, num_classes, parse_pair(image_size), parse_pair(grid))
    report = wrap_model(settings, build_model(settings, weights)).report()
    console.print(str(report), soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where figures and results go.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Of data, order and coalitions.")] = 0,
    train_images: Annotated[int, typer.Option(min=32)] = demonstration.TRAIN_IMAGES,
    test_images: Annotated[int, typer.Option(min=8)] = demonstration.TEST_IMAGES,
) -> None:
    """Fine-tune a pretrained network on digits among clutter, and look at what it says."""
    demonstration.run(
        out, seed=seed, train_images=train_images, test_images=test_images, console=console
    )


@app.command()
def train(
    model: Annotated[str, typer.Option(help="timm name, or torchvision:NAME.")],
    data: Annotated[Path, typer.Option(help="ImageFolder, with train/ and val/ or without.")],
    out: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/shapwrap"),
    weights: Annotated[Path | None, typer.Option(help="Pretrained weights, a file.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Pretrained weights of the library's hub.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out.")] = False,
    image_size: Size = None,
    grid: GridOption = None,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    max_steps: Annotated[int | None, typer.Option(help="Stop after these steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of the backbone.")] = 1e-4,
    shapley_weight: Annotated[
        str, typer.Option(help="Lambda of Eq. 14, or 'auto': as large as accuracy allows.")
    ] = "100",
    max_accuracy_drop: Annotated[
        float, typer.Option(help="With 'auto': below plain training, as a share of the images.")
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    limit: Annotated[int | None, typer.Option(min=1, help="At most these images.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Replace images that cannot be read.")
    ] = False,
    seed: int = 0,
) -> None:
    """Fine-tune a model on an image folder so that it explains itself."""
    request = TrainRequest(
        model=model,
        data=data,
        out=out,
        weights=weights,
        pretrained=pretrained,
        resume=resume,
        image_size=parse_pair(image_size),
        grid=parse_pair(grid),
        batch_size=batch_size,
        limit=limit,
        workers=workers,
        corrupt="skip" if skip_corrupt else "raise",
        trainer={
            "epochs": epochs,
            "max_steps": max_steps,
            "learning_rate": learning_rate,
            "shapley_weight": parse_weight(shapley_weight),
            "max_accuracy_drop": max_accuracy_drop,
            "precision": precision,
            "seed": seed,
        },
    )
    if weights is None and not pretrained and not resume:
        console.print("neither --weights nor --pretrained: training starts from random weights")
    metrics: dict[str, Any] = train_folder(request)
    console.print(
        f"accuracy {metrics['accuracy']:.3f}  skill {metrics['skill']:.3f}  "
        f"({metrics['images']:.0f} images)\nrun in {out}"
    )


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="--out of 'shapwrap train', or a saved model.")],
    out: Annotated[Path, typer.Option(help="Where figures and values go.")] = Path("out"),
    target: Annotated[
        str | None, typer.Option(help="Class name or index; the predicted class by default.")
    ] = None,
    contrast: Annotated[bool, typer.Option(help="Take the mean over classes off.")] = True,
) -> None:
    """Explain images: one figure and one JSON of values for each."""
    for line in explain_images(images, checkpoint, out, target=target, contrast=contrast):
        console.print(line, soft_wrap=True)


app.command()(serve)
app.command()(compare)
app.command()(zoo)


def parse_weight(text: str) -> float | Literal["auto"]:
    """A weight of the Shapley loss.

    Raises:
        ArgumentError: Something else.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise ArgumentError(
            f"--shapley-weight is {text!r}; expected a number, or 'auto'."
        ) from error


def parse_pair(text: str | None) -> tuple[int, int] | None:
    """(14, 14) from "14" or "14x14"; None from None.

    Raises:
        ArgumentError: Anything else.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ArgumentError(f"{text!r} is no size; expected one positive number, or ROWSxCOLUMNS.")
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]
