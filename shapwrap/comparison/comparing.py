"""One command: train, explain, measure, tabulate, draw."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapwrap.comparison.config import ComparisonConfig, parse_config, read_config, slug
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.figures import Strip, curve_figure, map_grid, save
from shapwrap.comparison.maps import restore
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

    Writes `results.csv`, `results.json`, `tables.md`, `figures/maps-MODEL` and
    `figures/curves-MODEL` (.pdf and .png).

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
        ConfigurationError: Something in the configuration cannot be meant; nothing has run yet.
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
    if restart:
        store.clear()
    folder.mkdir(parents=True, exist_ok=True)
    model_rows, rows = runner.run()
    comparison = Comparison(config, model_rows, rows, as_json(run), folder)
    write_json(comparison, folder / "results.json")
    write_csv(comparison, folder / "results.csv")
    write_atomically(folder / "tables.md", markdown(comparison).encode())
    _draw(comparison, images, store)
    return comparison


def _draw(comparison: Comparison, data: ComparisonData, store: Store) -> None:
    """Figures of every model that has maps."""
    metrics = [metric.name for metric in comparison.config.metrics]
    count = min(comparison.config.figures.images, len(data))
    shown = next(iter(data.batches(count, count))).image if count else None
    for model in comparison.models:
        rows = [r for r in comparison.rows if r.model == model.model and r.status == "finished"]
        if not rows:
            continue
        name = slug(model.model)
        curves = curve_figure(rows, metrics)
        if curves is not None:
            save(curves, comparison.out / "figures" / f"curves-{name}")
        if shown is None:
            continue
        strips, labels = [], []
        for row in rows:
            strip, labels = _strip(row, store, data, count)
            strips.append(strip)
        save(map_grid(shown, labels, strips), comparison.out / "figures" / f"maps-{name}")


def _strip(
    row: MethodRow, store: Store, data: ComparisonData, count: int
) -> tuple[Strip, list[str]]:
    """Maps of the first images, and the classes explained."""
    key = ("maps", row.model, row.method)
    said = restore(store.tensors(*key), row.facts)
    maps = said.heatmap()
    names, classes = data.class_names, said.target[:count].tolist()
    known = said.logits.shape[1] == len(names)
    labels = [names[index] if known else f"class {index}" for index in classes]
    limit = float(maps[:count].abs().max()) or 1.0
    return Strip(row.method, maps[:count], limit), labels
