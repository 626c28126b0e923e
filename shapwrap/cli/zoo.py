"""`shapwrap zoo`: wrap and check every model of the supported libraries."""

import datetime
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shapwrap.errors import ArgumentError
from shapwrap.zoo.catalogue import LIBRARIES, ModelName, list_models
from shapwrap.zoo.construct import count_parameters
from shapwrap.zoo.row import Row
from shapwrap.zoo.run import RunSettings, load_rows, run_survey, to_do
from shapwrap.zoo.shrink import Limits
from shapwrap.zoo.table import Origin, write_csv, write_json, write_markdown

console = Console(highlight=False)


def zoo(
    library: Annotated[
        str, typer.Option(help="timm, torchvision, open_clip, or several, comma separated.")
    ] = ",".join(LIBRARIES),
    filter: Annotated[
        str | None, typer.Option(help="Globs of model names, comma separated.")
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(help="Leave larger models out: 50M.", metavar="NUMBER")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Models checked at a time.")] = 2,
    out: Annotated[Path, typer.Option(help="Where results go, and are looked for.")] = Path(
        "runs/zoo"
    ),
    markdown: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Do those again that did not pass.")
    ] = False,
    shrink_above: Annotated[
        str,
        typer.Option(help="Multiply-adds an image above which a smaller instance is checked."),
    ] = "250M",
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds a model.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Of weights, images and coalitions.")] = 0,
) -> None:
    """Build models with random weights, wrap them, check them, and write a table."""
    models = list_models([name.strip() for name in library.split(",")], filter)
    if max_params is not None:
        largest = parse_number(max_params)
        models = [model for model in models if count_parameters(model) <= largest]
    settings = RunSettings(
        out=out,
        processes=processes,
        time_limit=time_limit,
        seed=seed,
        limits=Limits(work=parse_number(shrink_above)),
        retry=retry,
    )
    missing = to_do(models, load_rows(out), settings)
    console.print(f"{len(models)} models, {len(models) - len(missing)} of them finished before")
    _survey(missing, settings)
    rows = _rows(models, out)
    write_csv(rows, out / "compatibility.csv")
    write_json(rows, out / "compatibility.json")
    origin = Origin(datetime.date.today().isoformat(), _command())
    write_markdown(rows, out / "compatibility.md", origin)
    if markdown is not None:
        write_markdown(rows, markdown, origin)
    counts = Counter(row.outcome for row in rows)
    console.print(", ".join(f"{counts[name]} {name}" for name in counts) + f"; tables in {out}")


def _survey(models: list[ModelName], settings: RunSettings) -> None:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=len(models))
        for row in run_survey(models, settings) if models else ():
            bar.update(task, advance=1, description=f"{row.name[:32]:<32}")
            if row.outcome in ("failed", "error"):
                bar.console.print(f"{row.library}:{row.name} {row.outcome}: {row.reason[:200]}")


def _rows(models: list[ModelName], out: Path) -> list[Row]:
    found = load_rows(out)
    return [found[model] for model in models if model in found]


def _command() -> str:
    return shlex.join(["shapwrap", *sys.argv[1:]])


def parse_number(text: str) -> float:
    """50e6 from "50M"; K, M and G are known.

    Raises:
        ArgumentError: Anything else than a positive number.
    """
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
    unit = units.get(text[-1:].upper(), 1.0)
    try:
        number = float(text[:-1] if text[-1:].upper() in units else text) * unit
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ArgumentError(f"{text!r} is no positive number; expected one such as 50M or 1.5G.")
    return number
