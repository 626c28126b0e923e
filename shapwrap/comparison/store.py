"""Finished pieces of a comparison on disk, each with what it was made from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from shapwrap.comparison.config import slug
from shapwrap.errors import ConfigurationError
from shapwrap.saving import files

Status = Literal["finished", "not applicable", "failed"]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One finished part: a model, the maps of a method, a metric of them."""

    status: Status
    made_from: dict[str, Any]
    """All that decides the result; another one makes the piece stale."""
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why there is no result."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """Device, versions, command and time of the run that made it."""
    has_tensors: bool = False
    """Whether a .safetensors file belongs to it."""


class Store:
    """A folder of pieces; what is in it survives a kill at any moment.

    A piece is a JSON file, with a .safetensors file beside it where it has tensors. The JSON is
    written last and renamed into place, so a piece is there as a whole or not at all.

    Args:
        root: The folder.
        notify: Told, in a sentence, about every piece that is made again and why.
    """

    def __init__(self, root: Path, notify: Notify):
        self.root = root
        self._notify = notify

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """No other run may write here inside; a killed run leaves nothing that would forbid it.

        Raises:
            ConfigurationError: The folder cannot be written, or another run is at work there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("w")
        except OSError as error:
            raise ConfigurationError(
                f"out is {self.root}, where nothing can be written ({error}); expected a folder, "
                "or a path that can become one."
            ) from error
        with file:
            if not _lock(file):
                raise ConfigurationError(
                    f"another run writes to {self.root}; wait for its end, or give another out."
                )
            yield

    def clear(self) -> None:
        """Discard all pieces; other files in the folder stay."""
        for name in ("models", "explainers", "maps", "metrics"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def path(self, *key: str) -> Path:
        """Where a piece lies, without suffix."""
        # A dot in a label is no suffix, so suffixes are appended, never replaced.
        return self.root.joinpath(*(slug(part) for part in key))

    def read(self, *key: str, made_from: Mapping[str, Any]) -> Piece | None:
        """The piece, if it is there, finished or not applicable, and made from just this."""
        path = _with(self.path(*key), ".json")
        name = " / ".join(key)
        try:
            piece = Piece(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            self._notify(f"{name}: {path} is damaged ({error}) and is made again")
            return None
        different = differences(piece.made_from, as_json(made_from))
        if different:
            self._notify(f"{name}: made with other settings ({', '.join(different)}), made again")
            return None
        if piece.has_tensors and not _is_whole(_with(self.path(*key), ".safetensors")):
            self._notify(f"{name}: its .safetensors file is missing or damaged, made again")
            return None
        if piece.status == "failed":
            self._notify(f"{name}: failed before ({_first_line(piece.reason)}), tried again")
            return None
        return piece

    def holds(self, *key: str, made_from: Mapping[str, Any]) -> bool:
        """Whether `read` would give the piece; nobody is told."""
        return Store(self.root, lambda _: None).read(*key, made_from=made_from) is not None

    def write(self, *key: str, piece: Piece, tensors: Mapping[str, Tensor] | None = None) -> Piece:
        """Put a piece in place; returns it as it will be read."""
        path = self.path(*key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Old JSON beside new tensors would pass for a finished piece after a kill.
        self.forget(*key)
        if tensors is not None:
            write_tensors(_with(path, ".safetensors"), tensors)
        piece = replace(piece, has_tensors=tensors is not None)
        text = json.dumps(as_json(asdict(piece)), indent=2) + "\n"
        write_atomically(_with(path, ".json"), text.encode())
        return Piece(**json.loads(text))

    def forget(self, *key: str) -> None:
        """The piece counts as not made."""
        _with(self.path(*key), ".json").unlink(missing_ok=True)

    def tensors(self, *key: str) -> dict[str, Tensor]:
        """The tensors of a finished piece, on the CPU."""
        from safetensors.torch import load_file

        return load_file(_with(self.path(*key), ".safetensors"))

    def working_folder(self, *key: str, made_from: Mapping[str, Any]) -> tuple[Path, bool]:
        """A folder for what is not finished yet, and whether an earlier run left something there.

        What was begun with other settings is discarded.
        """
        folder = _with(self.path(*key), ".unfinished")
        note = folder / "made_from.json"
        begun = note.is_file() and not differences(json.loads(note.read_text()), as_json(made_from))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomically(note, json.dumps(as_json(made_from)).encode())
        return folder, begun

    def discard_working_folder(self, *key: str) -> None:
        """Remove it, once its piece is in place."""
        shutil.rmtree(_with(self.path(*key), ".unfinished"), ignore_errors=True)


def digest(made_from: Mapping[str, Any]) -> str:
    """Short name of what something was made from."""
    text = json.dumps(as_json(made_from), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Short name of a file's content."""
    return files.digest(Path(path))[:16]


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted names of what differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        prefix = f"{where}." if where else ""
        missing = object()
        return [
            difference
            for name in names
            for difference in differences(
                old.get(name, missing), new.get(name, missing), f"{prefix}{name}"
            )
        ]
    return [] if old == new else [where or "everything"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .safetensors file, renamed into place when it is whole."""
    from safetensors.torch import save_file

    # A clone, since the format refuses tensors that share memory, as tied weights do.
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    partial = _with(path, ".partial")
    save_file(kept, partial)
    partial.replace(path)


def _is_whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _with(path, ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, Tensor):
        return as_json(value.tolist())
    if isinstance(value, float):
        return value if torch.isfinite(torch.tensor(value)) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def _lock(file: IO[str]) -> bool:
    """Whether the file is ours alone; the system gives it back when the process ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _first_line(text: str) -> str:
    return text.splitlines()[0][:120] if text else "no reason"
