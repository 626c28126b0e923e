"""The record of a run: one JSON object a line, readable while the run goes on."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from shapwrap.errors import TrainingError
from shapwrap.training.faults import TrainingWarning

FILE_NAME = "history.jsonl"


class History:
    """Records of a run, in memory and, where a directory is given, in `history.jsonl`."""

    def __init__(self, directory: Path | None):
        self._path = directory / FILE_NAME if directory else None
        self._behind = False
        self.records: list[dict[str, Any]] = []

    def start(self, *, keep: int) -> list[dict[str, Any]]:
        """The first `keep` records of an earlier run, 0 for a new one, with which this one begins.

        Raises:
            TrainingError: The file cannot be written.
        """
        self.records = self._read(keep)
        if self._path is None:
            return self.records
        try:
            self._write_all(self._path)
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error}); expected an output_dir with room and "
                "the right to write. Nothing was trained."
            ) from error
        return self.records

    def add(self, **record: Any) -> None:
        """Append one record; a number that is not finite becomes null, which JSON can hold.

        Where the file cannot be written, the record is kept for the next time.
        """
        record = {name: _plain(value) for name, value in record.items()}
        self.records.append(record)
        if self._path is None:
            return
        try:
            if self._behind:
                self._write_all(self._path)
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            self._behind = False
        except OSError as error:
            self._fall_behind(error)

    def _read(self, keep: int) -> list[dict[str, Any]]:
        if not keep or self._path is None:
            return []
        records: list[dict[str, Any]] = []
        try:
            for line in self._path.read_text(encoding="utf-8").splitlines()[:keep]:
                records.append(json.loads(line))
        except (OSError, ValueError) as error:
            reason = str(error)
        else:
            reason = "it is shorter"
        if len(records) < keep:
            warnings.warn(
                f"of {keep} records of the run so far, {self._path} has only the first "
                f"{len(records)} ({reason}); the others are lost.",
                TrainingWarning,
                stacklevel=2,
            )
        return records

    def _write_all(self, path: Path) -> None:
        # Under another name first: a full disk must not cost what is there.
        new = path.with_name(f"{FILE_NAME}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        new.replace(path)

    def _fall_behind(self, error: OSError) -> None:
        if not self._behind:
            warnings.warn(
                f"{self._path} cannot be written ({error}); the run goes on, and records are "
                "written as soon as they can be.",
                TrainingWarning,
                stacklevel=3,
            )
        self._behind = True


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
