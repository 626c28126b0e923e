"""One command: train, explain, measure, tabulate, draw."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapwrap.comparison.config import ComparisonConfig, parse_config, read_config, slug
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.figures import Strip, curve_figure, map_grid, save
from shapwrap.comparison.maps import restore, rows_of
from shapwrap.comparison.protocol import choose_device, describe_run
from shapwrap.comparison.registry import DATA, find
from shapwrap.comparison.results import Comparison, MethodRow, write_csv, write_json
from shapwrap.comparison.runner import Runner
from shapwrap.comparison.store import Store, as_json, write_atomically
from shapwrap.comparison.tables import markdown

logger = logging.getLogger("shapwrap")


def compare(
    config: ComparisonConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    restart: bool = False,
    models: Mapping[str, Callable[..., Any]] | None = None,
    methods: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    data: Mapping[str, Callable[..., ComparisonData]] | None = None,
    command: str | None = None,
    notify: Callable[[str], None] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """All results of models x methods x metrics on a data set, also written to a folder.

    What is finished there already, with the same settings, is read and not made again; a run that
    was killed goes on where it stopped. What fails is recorded and the rest goes on: see
    `Comparison.failures`.

    Writes `results.csv`, `results.json`, `tables.md`, and figures of maps and curves of each model
    and of all together (`figures/maps-MODEL`, `figures/curves-MODEL`, .pdf and .png).

    Args:
        config: A configuration, a mapping like one, or a YAML file.
        out: Folder; by default that of the configuration.
        restart: Discard what is finished there.
        models: Functions that make models of your own, by the name that `model` says; they may
            take `num_classes` and `image_size`.
        methods: Classes of methods of your own, by the name that `method` says: made with the
            model and the options, called with normalised images and classes.
        metrics: Functions of a `Subject` that return a `Measured`, by the name that `metric` says.
        data: Functions of a `DataConfig` and the seed, by the name that `kind` says.
        command: For the record; by default the command line.
        notify: Told what is worth a line; by default a logger's info.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ConfigurationError: Something in the configuration cannot be meant, or the folder cannot be
            written or is in use by another run; nothing has run yet.
        MissingDependencyError: A package that reading, training or drawing needs is missing.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    elif not isinstance(config, ComparisonConfig):
        config = parse_config(config)
    if out is not None:
        config = replace(config, out=str(out))
    folder = Path(config.out)
    notify = notify or logger.info
    device = choose_device(config.device)
    make_data = (data or {}).get(config.data.kind) or find(config.data.kind, DATA, "kind of data")
    images = make_data(config.data, config.seed)
    run = describe_run(device, command) | {"images": len(images), "data": images.facts}
    store = Store(folder, notify)
    own = {"models": models or {}, "methods": methods or {}, "metrics": metrics or {}}
    runner = Runner(config, images, store, device, run, own, notify, progress)
    with store.reserved():
        if restart:
            store.clear()
        model_rows, rows = runner.run()
        comparison = Comparison(config, model_rows, rows, as_json(run), folder)
        write_json(comparison, folder / "results.json")
        write_csv(comparison, folder / "results.csv")
        write_atomically(folder / "tables.md", markdown(comparison).encode())
        _draw(comparison, images, store)
    return comparison


def _draw(comparison: Comparison, data: ComparisonData, store: Store) -> None:
    """Figures of every model that has maps, and of all of them together where there are several."""
    metrics = [metric.name for metric in comparison.config.metrics]
    count = min(comparison.config.figures.images, len(data))
    # Data often comes class by class.
    places = [number * len(data) // count for number in range(count)]
    shown = data.picked(places) if count else None
    explained = [row for row in comparison.rows if row.status == "finished"]
    groups = {row.model: [r for r in explained if r.model == row.model] for row in explained}
    if len(groups) > 1:
        groups[""] = explained
    for model, rows in groups.items():
        ending = f"-{slug(model)}" if model else ""
        wanted = metrics if comparison.config.figures.curves else []
        curves = curve_figure(rows, wanted, several_models=not model)
        if curves is not None:
            save(curves, comparison.out / "figures" / f"curves{ending}")
        if shown is not None:
            names = [_class_name(int(index), data.class_names) for index in shown.label]
            strips = [
                _strip(row, store, places, data.class_names, several_models=not model)
                for row in rows
            ]
            figure = map_grid(shown.image, names, strips)
            save(figure, comparison.out / "figures" / f"maps{ending}")


def _strip(
    row: MethodRow, store: Store, places: list[int], class_names: list[str], *, several_models: bool
) -> Strip:
    """Maps of the images at these places."""
    said = rows_of(restore(store.tensors("maps", row.model, row.method), row.facts), places)
    title = f"{row.method}\n{row.model}" if several_models else row.method
    classes = [_class_name(int(index), class_names) for index in said.target]
    return Strip.of(title, said.heatmap(), classes)


def _class_name(index: int, names: list[str]) -> str:
    return names[index] if 0 <= index < len(names) else ""
