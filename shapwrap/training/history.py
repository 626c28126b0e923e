"""The record of a run: one JSON object a line, readable while the run goes on."""

import json
import math
from pathlib import Path
from typing import Any

FILE_NAME = "history.jsonl"


class History:
    """Records of a run, in memory and, where a directory is given, in `history.jsonl`."""

    def __init__(self, directory: Path | None):
        self._path = directory / FILE_NAME if directory else None
        self.records: list[dict[str, Any]] = []

    def start(self, *, keep: int) -> None:
        """Begin with the first `keep` records of an earlier run, 0 for a new one."""
        self.records = []
        if keep and self._path and self._path.exists():
            lines = self._path.read_text().splitlines()[:keep]
            self.records = [json.loads(line) for line in lines]
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, **record: Any) -> None:
        """Append one record; a number that is not finite becomes null, which JSON can hold."""
        record = {name: _plain(value) for name, value in record.items()}
        self.records.append(record)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
