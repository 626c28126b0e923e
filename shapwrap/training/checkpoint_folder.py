"""The files of a checkpoint: written whole or not at all, checked before they are read."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shapwrap._version import __version__
from shapwrap.errors import CheckpointError
from shapwrap.saving.files import digest

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
TENSORS = "state.safetensors"
TREE = "state.json"
FILES = (MODEL, TENSORS, TREE)
PARTIAL = ".partial-"
_NAME = re.compile(r"step-(\d+)")


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def folders(directory: Path) -> list[Path]:
    """Folders named as checkpoints, whole or not, oldest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is. Contents are not looked at, only sizes."""
    try:
        files = manifest(folder)["files"]
        sizes = {name: int(files[name]["bytes"]) for name in FILES}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, expected {size}"
    return None


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        OSError: There is none.
        ValueError: It is no JSON.
    """
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def write(
    folder: Path, files: Mapping[str, Callable[[Path], None]], about: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint under another name, rename it, and remove older ones.

    A process that is killed at any moment leaves the earlier checkpoints and at most a partial
    one, which is never read. The manifest is written last.

    Args:
        folder: Its final name.
        files: For each file, what writes it.
        about: What the manifest says beside sizes and digests.
        keep: How many whole checkpoints are kept, this one included.

    Raises:
        CheckpointError: It could not be written; earlier ones are as they were.
    """
    directory = folder.parent
    partial = directory / f"{PARTIAL}{folder.name}"
    try:
        for left_over in directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        for name, write_file in files.items():
            write_file(partial / name)
            _to_disk(partial / name)
        said = {"format": FORMAT, "shapwrap": __version__, **about, "files": _described(partial)}
        (partial / MANIFEST).write_text(json.dumps(said, indent=1), encoding="utf-8")
        _to_disk(partial / MANIFEST)
        if folder.exists():
            # Not whole, or it would not be written again.
            shutil.rmtree(folder)
        partial.replace(folder)
        _to_disk(directory)
        _thin_out(directory, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {folder} could not be written ({error}); earlier checkpoints are as they "
            "were. Make room on the disk, or lower keep_checkpoints."
        ) from error


def verify(folder: Path) -> None:
    """Raise unless every file is the one that was written.

    Raises:
        CheckpointError: Another format, or a file whose digest is not that of the manifest.
    """
    said = manifest(folder)
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {said.get('format')!r}, written by shapwrap "
            f"{said.get('shapwrap')}; this is {__version__}, expected format {FORMAT}. Go on with "
            "the version that wrote it, or start anew elsewhere."
        )
    for name in FILES:
        if digest(folder / name) != said["files"][name].get("sha256"):
            raise CheckpointError(
                f"{folder / name} is not the file that was written: its SHA-256 is not that of "
                f"{MANIFEST}. It is damaged or was changed; restore it from a copy, or delete "
                f"{folder.name} to go on from an earlier checkpoint."
            )


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in FILES
    }


def _thin_out(directory: Path, keep: int) -> None:
    whole = [folder for folder in folders(directory) if fault(folder) is None]
    if len(whole) > keep:
        for folder in folders(directory):
            if _step(folder) < _step(whole[-keep]):
                # One that cannot be removed costs room and nothing else.
                shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _to_disk(path: Path) -> None:
    """Wait until it would survive a loss of power."""
    if path.is_dir() and os.name == "nt":
        # Windows opens no folders.
        return
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
