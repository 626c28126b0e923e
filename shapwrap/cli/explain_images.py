"""`shapwrap explain`: figures and values for image files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from shapwrap.cli.run_folder import load_run
from shapwrap.clip import ShapleyCLIP
from shapwrap.data.folder import image_transform
from shapwrap.errors import ArgumentError
from shapwrap.explanation import Explanation


def explain_images(
    paths: Sequence[Path], checkpoint: Path, out: Path, *, target: str | None, contrast: bool
) -> Iterator[str]:
    """Writes `NAME.png` and `NAME.json` for each image; yields a line on each.

    Raises:
        ArgumentError: No such run, image or class, or a model of images and texts.
    """
    normalization, wrapped = load_run(checkpoint)
    if isinstance(wrapped, ShapleyCLIP):
        raise ArgumentError(
            f"{checkpoint} holds an image-text model; expected a classifier. 'shapwrap serve' "
            "takes images and texts."
        )
    transform = image_transform(wrapped.image_size, normalization, augment=False)
    index = None if target is None else _class_index(target, wrapped.class_names)
    out.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for path in paths:
        try:
            with Image.open(path) as picture:
                tensor: Any = transform(picture)
        except (OSError, UnidentifiedImageError) as error:
            raise ArgumentError(f"{path} cannot be read as an image: {error}") from error
        image: Tensor = tensor[None]
        explanation = wrapped.explain(image, index, contrast=contrast)
        name = _free_name(path.stem, taken)
        figure = explanation.plot(image, normalization=normalization)
        figure.savefig(out / f"{name}.png", dpi=120)
        record = _record(path, explanation)
        (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        yield f"{path}: {record['class']} (logit {record['logit']:.2f}) -> {out / name}.png"


def _record(path: Path, explanation: Explanation) -> dict[str, object]:
    target = int(explanation.target[0])
    names = explanation.class_names
    rows, columns = explanation.grid
    return {
        "image": str(path),
        "target": target,
        "class": names[target] if names is not None else str(target),
        "logit": float(explanation.logits[0, target]),
        "explained": float(explanation.explained()[0]),
        "contrast": explanation.contrast,
        "efficiency_gap": float(explanation.efficiency_gap()[0]),
        "grid": [rows, columns],
        "values": explanation.values[0].reshape(rows, columns).tolist(),
    }


def _class_index(target: str, names: list[str] | None) -> int:
    if names is not None and target in names:
        return names.index(target)
    if target.isdigit():
        return int(target)
    known = ", ".join(names[:10]) if names else "no names are known"
    raise ArgumentError(f"--target {target!r} is no class name or index; classes: {known}.")


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
