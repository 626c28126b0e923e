"""`shapwrap compare`: models x methods x metrics on a data set."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from shapwrap.errors import ArgumentError

console = Console(highlight=False)


def compare(
    config: Annotated[Path | None, typer.Option(help="What to compare, in YAML.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where results go; overrides the configuration.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart/--resume", help="Discard what is finished, or go on from it."),
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Print known methods, metrics and data, and stop.")
    ] = False,
) -> None:
    """Train, explain and measure; write tables and figures. A killed run goes on when repeated."""
    # The other commands start faster without it.
    from shapwrap.comparison import compare as run_comparison
    from shapwrap.comparison.tables import markdown

    if list_:
        _print_known()
        return
    if config is None:
        raise ArgumentError("--config is missing; expected a YAML file, or --list.")
    done = run_comparison(
        config,
        out=out,
        restart=restart,
        command=shlex.join(["shapwrap", *sys.argv[1:]]),
        notify=lambda line: console.print(line, soft_wrap=True, markup=False),
    )
    console.print(Markdown(markdown(done)))
    console.print(f"tables, figures and results in {done.out}/", soft_wrap=True, markup=False)
    failures = done.failures()
    if failures:
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
        raise typer.Exit(1)


def _print_known() -> None:
    from shapwrap.comparison.registry import DATA, METHODS, METRICS

    width = max(map(len, METHODS))
    lines = ["methods:"]
    for name, entry in METHODS.items():
        models = "" if entry.models == "all" else f" ({entry.models} models)"
        lines.append(f"  {name:<{width}}  {entry.title}{models}")
    lines += ["metrics:", *(f"  {name}" for name in METRICS)]
    lines += ["data:", *(f"  {name}" for name in DATA)]
    lines.append("your own: module:name")
    console.print("\n".join(lines), soft_wrap=True, markup=False)
