"""What came out: one row a model, one row a model and method."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapwrap.comparison.config import ComparisonConfig
from shapwrap.comparison.store import Status, as_json, write_atomically


@dataclass(frozen=True)
class Outcome:
    """One metric of one row, or why there is none."""

    status: Status
    reason: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    undefined: dict[str, int] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRow:
    """One row of Table 1."""

    model: str
    kind: str
    status: Status
    reason: str = ""
    accuracy: float | None = None
    accuracy_error: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    """Of the logits of one image."""
    multiply_adds_explained: int | None = None
    """With the patch values of all classes, for a wrapped model."""
    accuracy_images: int | None = None
    """How many images accuracy was measured on."""
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodRow:
    """One method on one model."""

    model: str
    kind: str
    method: str
    status: Status
    reason: str = ""
    """Why there are no maps."""
    metrics: dict[str, Outcome] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Of its maps: grid, images, seconds, largest efficiency gap."""
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All results, with the configuration and what the numbers were made on."""

    config: ComparisonConfig
    models: list[ModelRow]
    rows: list[MethodRow]
    run: dict[str, Any]
    """Command, device, versions and date of the last run; each row has those of its own."""
    out: Path

    def failures(self) -> list[str]:
        """One sentence for everything that failed; empty if nothing did."""
        said = [f"{m.model}: {m.reason}" for m in self.models if m.status == "failed"]
        broken = {m.model for m in self.models if m.status == "failed"}
        for row in self.rows:
            if row.model in broken:
                continue
            name = f"{row.model} / {row.method}"
            if row.status == "failed":
                said.append(f"{name}: {row.reason}")
            said += [
                f"{name} / {metric}: {outcome.reason}"
                for metric, outcome in row.metrics.items()
                if outcome.status == "failed"
            ]
        return said

    def records(self) -> list[dict[str, Any]]:
        """One flat record a model and method: `faithfulness.aopc`, `faithfulness.aopc_error`."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {
                "model": row.model,
                "kind": row.kind,
                "method": row.method,
                "status": row.status,
                "reason": row.reason,
            }
            for metric, outcome in row.metrics.items():
                record[f"{metric}.status"] = outcome.status
                for name, number in outcome.summary.items():
                    record[f"{metric}.{name}"] = number
                    if name in outcome.errors:
                        record[f"{metric}.{name}_error"] = outcome.errors[name]
            records.append(record)
        return records


def write_json(comparison: Comparison, path: Path) -> None:
    """Everything, with the protocol of every number."""
    content = {
        "run": comparison.run,
        "config": asdict(comparison.config),
        "models": [asdict(row) for row in comparison.models],
        "rows": [asdict(row) for row in comparison.rows],
    }
    text = json.dumps(as_json(content), indent=2) + "\n"
    write_atomically(path, text.encode())


def write_csv(comparison: Comparison, path: Path) -> None:
    """`Comparison.records` as a table; a number that is not defined is an empty cell."""
    records = comparison.records()
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) for name, value in record.items()})
    write_atomically(path, text.getvalue().encode())


def outcome_of(result: Mapping[str, Any], protocol: Mapping[str, Any]) -> Outcome:
    """A finished metric as it was read from disk; what JSON cannot hold is NaN again."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Outcome(
        status="finished",
        summary={name: number(value) for name, value in result["summary"].items()},
        errors={name: number(value) for name, value in result["errors"].items()},
        undefined=dict(result["undefined"]),
        curves={
            name: {part: [number(v) for v in values] for part, values in curve.items()}
            for name, curve in result["curves"].items()
        },
        protocol={**protocol, **result["protocol"]},
    )


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
