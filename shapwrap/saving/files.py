"""The files of a saved model: written one after the other, checked before anything is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shapwrap.errors import SavedModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
GENERATED = "<!-- Written by shapwrap; remove this line to keep your own changes. -->"
"""Marks a model card that may be written anew."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(
    folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], card: str | None
) -> None:
    """Write weights, model card and, last, the configuration, which says what the weights are.

    Each file replaces an earlier one at once. A card without the mark of a generated one is left.

    Args:
        folder: Made if it is not there; other files in it stay.
        tensors: Contiguous, on the CPU, no two in one storage.
        config: Size and digest of the weights are added.
        card: Text of the model card; None writes none.

    Raises:
        SavedModelError: It cannot be written.
    """
    temporary = folder / f"{WEIGHTS}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        size, sha256 = temporary.stat().st_size, digest(temporary)
        config = {
            **config,
            "weights": {**config["weights"], "file": WEIGHTS, "bytes": size, "sha256": sha256},
        }
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        temporary.replace(folder / WEIGHTS)
        path = folder / CARD
        if card is not None and _may_be_written(path):
            _replace(path, card)
        _replace(folder / CONFIG, text)
    except (OSError, SafetensorError) as error:
        raise SavedModelError(
            f"the model cannot be saved in {folder} ({error}); expected a folder with room and the "
            "right to write."
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SavedModelError: It cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected the JSON that "
            "save_pretrained writes. Fetch it anew, or restore it from a copy."
        ) from error
    if not isinstance(found, dict):
        raise SavedModelError(
            f"{path} holds a JSON {type(found).__name__}; expected an object, as save_pretrained "
            "writes it."
        )
    return found


def read_weights(path: Path, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU.

    Args:
        path: Of the file.
        said: What the configuration says of it: name, size and digest.

    Raises:
        SavedModelError: It is missing, or not the file that was written.
    """
    if said.get("file") != WEIGHTS:
        raise SavedModelError(
            f"{CONFIG} says that the weights are in {said.get('file')!r}; expected {WEIGHTS!r}, "
            "beside it. The folder was changed."
        )
    if not path.is_file():
        raise SavedModelError(f"{path} is missing; expected the weights beside {CONFIG}.")
    size = path.stat().st_size
    if size != said.get("bytes"):
        raise SavedModelError(
            f"{path} has {size} bytes, {CONFIG} says {said.get('bytes')}; it is truncated, or of "
            "another save. Fetch both files anew, or restore them from a copy."
        )
    if digest(path) != said.get("sha256"):
        raise SavedModelError(
            f"{path} is not the file that was written: its SHA-256 is not that of {CONFIG}. It is "
            "damaged or was changed; fetch it anew, or restore it from a copy."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise SavedModelError(f"{path} is no safetensors file ({error}).") from error


def _may_be_written(path: Path) -> bool:
    return not path.exists() or GENERATED in path.read_text(encoding="utf-8", errors="replace")


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.partial")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
