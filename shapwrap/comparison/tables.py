"""Markdown tables in the shape of the paper's Tables 1 to 3, and of the further metrics."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shapwrap.comparison.config import MetricConfig
from shapwrap.comparison.results import Comparison, MethodRow, ModelRow


class Column(NamedTuple):
    """One number of a metric, as a table shows it."""

    key: str
    title: str
    better: int = 0
    """1 where higher is better, -1 where lower is, 0 where neither."""
    digits: int = 3
    scale: float = 1.0


TITLES = {
    "faithfulness": "Faithfulness (the paper's Table 2)",
    "localisation": "Localisation (the paper's Table 3)",
    "insertion_deletion": "Insertion and deletion",
    "shapley_truth": "Distance from the model's own Shapley values",
    "cost": "Cost of an explanation",
}

COLUMNS = {
    "faithfulness": (
        Column("aopc", "AOPC ↑", 1),
        Column("log_odds", "LOdds ↓", -1),
        Column("saco", "SaCo ↑", 1, digits=4),
    ),
    "localisation": (
        Column("pixel_accuracy", "Pix. Acc. ↑", 1, digits=2, scale=100),
        Column("mean_average_precision", "mAP ↑", 1, digits=2, scale=100),
        Column("mean_iou", "mIoU ↑", 1, digits=2, scale=100),
        Column("pointing", "pointing ↑", 1, digits=2, scale=100),
    ),
    "insertion_deletion": (
        Column("insertion", "insertion ↑", 1),
        Column("deletion", "deletion ↓", -1),
    ),
    "shapley_truth": (
        Column("l2", "L2 ↓", -1),
        Column("rmse", "RMSE ↓", -1, digits=4),
        Column("pearson", "Pearson ↑", 1),
        Column("spearman", "Spearman ↑", 1),
        Column("skill", "skill ↑", 1),
    ),
    "cost": (
        Column("forward_equivalents", "forward passes ↓", -1, digits=1),
        Column("seconds", "seconds an image ↓", -1, digits=4),
    ),
}

Cell = tuple[float, float]
"""Number and standard error, NaN where there is none."""


def markdown(comparison: Comparison) -> str:
    """All tables, each with its protocol."""
    parts = [model_table(comparison)]
    parts += [metric_table(comparison, metric) for metric in comparison.config.metrics]
    parts.append(_footnotes(comparison))
    return "\n\n".join(part for part in parts if part) + "\n"


def model_table(comparison: Comparison) -> str:
    """Table 1: accuracy and cost of the models."""
    done = [row for row in comparison.models if row.status == "finished"]
    cells = [[_accuracy(row)] for row in done]
    bold = _best(cells, [Column("accuracy", "", 1)])
    lines = []
    for row, cell, best in zip(done, cells, bold, strict=True):
        count = "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M"
        accuracy = _shown(cell[0], Column("accuracy", "", 1, digits=1, scale=100), bold=best[0])
        lines.append([row.model, row.kind, accuracy, count, _multiply_adds(row)])
    header = ["model", "kind", "Acc@1, % ↑", "parameters", "multiply-adds"]
    text = "## Models (the paper's Table 1)\n\n" + _table(header, lines, left=2)
    tested = sorted({row.accuracy_images for row in done if row.accuracy_images})
    on = f"Accuracy on {' or '.join(map(str, tested))} images. " if tested else ""
    return f"{text}\n\n{on}Multiply-adds of one image; of a wrapped model with all patch values."


def metric_table(comparison: Comparison, metric: MetricConfig) -> str:
    """One metric of every method on every model, the best of each column in bold."""
    rows = [
        row
        for row in comparison.rows
        if row.metrics.get(metric.name) and row.metrics[metric.name].status == "finished"
    ]
    title = TITLES.get(metric.metric, metric.name)
    if metric.name != metric.metric:
        title += f": {metric.name}"
    if not rows:
        return f"## {title}\n\nNo result."
    columns = COLUMNS.get(metric.metric) or _own_columns(rows, metric)
    cells = [[_cell(row, metric, column) for column in columns] for row in rows]
    bold = _best(cells, columns)
    lines = [
        [row.model, row.method, *map(_shown, numbers, columns, best)]
        for row, numbers, best in zip(rows, cells, bold, strict=True)
    ]
    header = ["model", "method", *(column.title for column in columns)]
    protocol = rows[0].metrics[metric.name].protocol
    return f"## {title}\n\n{_table(header, lines, left=2)}\n\n{_protocol(protocol)}"


def _own_columns(rows: Sequence[MethodRow], metric: MetricConfig) -> tuple[Column, ...]:
    names = dict.fromkeys(name for row in rows for name in row.metrics[metric.name].summary)
    return tuple(Column(name, name.replace("_", " ")) for name in names)


def _cell(row: MethodRow, metric: MetricConfig, column: Column) -> Cell:
    outcome = row.metrics[metric.name]
    return (
        outcome.summary.get(column.key, math.nan),
        outcome.errors.get(column.key, math.nan),
    )


def _accuracy(row: ModelRow) -> Cell:
    nothing = math.nan
    return (
        nothing if row.accuracy is None else row.accuracy,
        nothing if row.accuracy_error is None else row.accuracy_error,
    )


def _multiply_adds(row: ModelRow) -> str:
    count = row.multiply_adds_explained or row.multiply_adds
    return "–" if count is None else f"{count / 1e9:.2f} G"


def _best(cells: Sequence[Sequence[Cell]], columns: Sequence[Column]) -> list[list[bool]]:
    """Whether each cell shows the best number of its column; equal as shown is equally good."""
    marks = [[False] * len(columns) for _ in cells]
    for index, column in enumerate(columns):
        numbers = [round(row[index][0] * column.scale, column.digits) for row in cells]
        known = [number for number in numbers if not math.isnan(number)]
        if column.better == 0 or len(known) < 2:
            continue
        choose: Callable[[list[float]], float] = max if column.better > 0 else min
        best = choose(known)
        for mark, number in zip(marks, numbers, strict=True):
            mark[index] = number == best
    return marks


def _shown(cell: Cell, column: Column, bold: bool) -> str:
    number, error = (value * column.scale for value in cell)
    if math.isnan(number):
        return "–"
    text = f"{number:.{column.digits}f}"
    text = f"**{text}**" if bold else text
    return text if math.isnan(error) else f"{text} ± {error:.{column.digits}f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    rows = [header, rule, *([text.replace("|", "\\|") for text in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


HIDDEN = ("command", "device", "versions", "date", "warnings", "data", "chunk_size", "batch_size")


def _protocol(protocol: dict[str, object]) -> str:
    """What was chosen; device and versions of the run stand once, below."""
    said = [f"{name}: {what}" for name, what in protocol.items() if name not in HIDDEN]
    return "Protocol (first row): " + "; ".join(said) + ". ± is one standard error over images."


def _footnotes(comparison: Comparison) -> str:
    data = comparison.config.data
    run = comparison.run
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    size = f"{data.image_size[0]} x {data.image_size[1]}"
    lines = [
        "## Run\n",
        f"Data: {data.kind}, {run['images']} images of {size} pixels. Seed "
        f"{comparison.config.seed}. Device: {run['device']}. {versions}. {run['date']}.",
        f"\n```bash\n{run['command']}\n```",
    ]
    absent = _without_result(comparison)
    if absent:
        lines.append("\nWithout a result:\n\n" + "\n".join(absent))
    return "\n".join(lines)


def _without_result(comparison: Comparison) -> list[str]:
    """What is absent and why, one line for all that is absent for one reason."""
    named: dict[str, dict[str, list[str]]] = {}

    def note(model: str, parts: list[str], status: str, reason: str) -> None:
        why = f"{', '.join(parts[1:])}: {status}: {_one_line(reason)}".removeprefix(": ")
        named.setdefault(why, {}).setdefault(model, []).extend(parts[:1])

    for row in comparison.rows:
        if row.status != "finished":
            note(row.model, [row.method], row.status, row.reason)
        for name, outcome in row.metrics.items():
            if outcome.status != "finished":
                note(row.model, [row.method, name], outcome.status, outcome.reason)
    for row in comparison.models:
        if row.status != "finished":
            note(row.model, [], "failed", row.reason)
    return [
        "- "
        + "; ".join(", ".join([model, *methods]) for model, methods in models.items())
        + f": {why}"
        for why, models in named.items()
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())
