"""Many models in parallel processes: resumable, with a time limit, and no process is indispensable.

One JSON line is appended for each finished model. A later run skips models whose latest line has
the same versions, seed and limits.
"""

import json
import multiprocessing
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from shapwrap._version import __version__
from shapwrap.errors import ArgumentError, MissingDependencyError
from shapwrap.zoo.catalogue import ModelName
from shapwrap.zoo.row import Row
from shapwrap.zoo.shrink import Limits
from shapwrap.zoo.survey import survey_model

RESULTS = "results.jsonl"
PACKAGES = ("torch", "timm", "torchvision", "open_clip_torch")
TASKS_PER_WORKER = 150
"""A fresh process now and then keeps what libraries cache from piling up."""


@dataclass(frozen=True)
class RunSettings:
    """How a selection is surveyed."""

    out: Path
    processes: int = 2
    time_limit: float = 180.0
    """Seconds a model, after which its process is ended."""
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    retry: bool = False
    """Do those again that did not pass."""


def versions() -> str:
    """Of everything that decides a result, in one line."""
    found = [f"shapwrap {__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])


def load_rows(out: Path) -> dict[ModelName, Row]:
    """The latest row of each model in a folder.

    Raises:
        ArgumentError: A line that is no row.
    """
    path = out / RESULTS
    rows: dict[ModelName, Row] = {}
    if not path.is_file():
        return rows
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = Row.from_json(json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                # A run that was ended while it wrote: that model is done again.
                break
            raise ArgumentError(f"{path}, line {number} is damaged: {error}.") from error
        rows[ModelName(row.library, row.name)] = row
    return rows


def to_do(
    models: Iterable[ModelName], rows: dict[ModelName, Row], settings: RunSettings
) -> list[ModelName]:
    """Models without a row of this run's versions and seed, or to be done again."""
    now = versions()

    def finished(model: ModelName) -> bool:
        row = rows.get(model)
        if row is None or row.versions != now or row.seed != settings.seed:
            return False
        return row.outcome == "wraps" or not settings.retry

    return [model for model in models if not finished(model)]


def run_survey(models: list[ModelName], settings: RunSettings) -> Iterator[Row]:
    """Surveys models and yields their rows as they are finished and written.

    Raises:
        MissingDependencyError: Without pebble, which ends processes that take too long.
    """
    try:
        from pebble import ProcessPool
    except ImportError as error:
        raise MissingDependencyError(
            "pebble is not installed; the survey needs: pip install 'shapwrap[zoo]'"
        ) from error
    settings.out.mkdir(parents=True, exist_ok=True)
    _end_last_line(settings.out / RESULTS)
    now = versions()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPool(
            max_workers=settings.processes,
            max_tasks=TASKS_PER_WORKER,
            initializer=_prepare_worker,
            context=context,
        ) as pool,
        (settings.out / RESULTS).open("a") as file,
    ):
        waiting: dict[Future[Row], ModelName] = {
            pool.schedule(
                _survey,
                args=(model, settings.seed, settings.limits, now),
                timeout=settings.time_limit,
            ): model
            for model in models
        }
        try:
            for future in as_completed(waiting):
                row = _row_of(future.result, waiting[future], settings, now)
                file.write(json.dumps(row.to_json()) + "\n")
                file.flush()
                yield row
        except BaseException:
            # Left early: what has not begun is dropped.
            pool.stop()
            raise


def _prepare_worker() -> None:
    torch.set_num_threads(1)


def _survey(model: ModelName, seed: int, limits: Limits, now: str) -> Row:
    return survey_model(model, seed=seed, limits=limits, versions=now)


def _row_of(result: Callable[[], Row], model: ModelName, settings: RunSettings, now: str) -> Row:
    """The row of a finished task; of one that did not return, a row that says so."""
    lost = Row(model.library, model.name, seed=settings.seed, versions=now)
    try:
        return result()
    except (TimeoutError, FutureTimeoutError):
        lost.reason = f"took more than {settings.time_limit:g} s"
        lost.seconds = settings.time_limit
    except Exception as error:
        lost.reason = f"the process died ({type(error).__name__}: {error})"
    return lost


def _end_last_line(path: Path) -> None:
    """A run that was ended while it wrote leaves half a line, which would spoil the next one."""
    if not path.is_file():
        return
    text = path.read_text()
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
