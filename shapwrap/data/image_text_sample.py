"""From the bytes of a stored sample to an image and its caption."""

import json
import random
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from shapwrap._types import Images
from shapwrap.data.seeded import seeded
from shapwrap.data.shard_reader import IMAGES, StoredSample
from shapwrap.data.skipped import Skip
from shapwrap.errors import ArgumentError

Captions = Literal["first", "random"]
Transform = Callable[[Any], Tensor]
"""From a PIL image in RGB to a float tensor."""


def decode(
    sample: StoredSample, transform: Transform, captions: Captions | str, seed: str
) -> tuple[Tensor, str] | Skip:
    """Image and caption, or why there are none.

    Everything random about it, the transform included, is drawn from a seed of its own: it does not
    matter in which process or after which other sample it is decoded.

    Args:
        sample: As it is stored.
        transform: Of the image.
        captions: Which of several captions.
        seed: Of the epoch.

    Raises:
        ArgumentError: The transform gives no tensor.
        Exception: Whatever the transform raises, with the sample's key.
    """
    generator = random.Random(f"{seed} {sample.key}")
    found = captions_of(sample)
    if not found:
        return Skip("without a caption", sample.key)
    caption = found[0] if captions == "first" else generator.choice(found)
    image = picture_of(sample)
    if isinstance(image, Skip):
        return image
    with seeded(generator.getrandbits(63)):
        return transformed(image, transform, sample.key), caption


def transformed(image: Image.Image, transform: Transform, key: str) -> Tensor:
    """The image as the model reads it.

    Raises:
        ArgumentError: The transform gives no tensor.
        Exception: Whatever the transform raises, with the sample's key.
    """
    try:
        made: object = transform(image)
    except Exception as error:
        error.add_note(f"while transforming sample {key!r}")
        raise
    if not isinstance(made, Tensor):
        raise ArgumentError(
            f"the transform made {type(made).__name__} of sample {key!r}; expected a float tensor "
            "[C, H, W]: let it end in ToTensor()."
        )
    return made


def stacked(images: Sequence[Tensor]) -> Images:
    """One batch.

    Raises:
        ArgumentError: Images of several shapes.
    """
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ArgumentError(
            f"the transform made images of shapes {sorted(shapes)}; expected one shape: let it "
            "resize and crop."
        )
    return torch.stack(list(images))


def picture_of(sample: StoredSample) -> Image.Image | Skip:
    """The image in RGB, or why there is none."""
    name = next((name for name in IMAGES if name in sample.fields), None)
    if name is None:
        return Skip("without an image", sample.key)
    try:
        with Image.open(BytesIO(sample.fields[name])) as opened:
            return opened.convert("RGB")
    except Exception as error:  # what broken bytes raise depends on the format
        return Skip("with a corrupt image", f"{sample.key} ({error})")


def captions_of(sample: StoredSample) -> list[str]:
    """All captions: "captions" of the .json, else the .txt, else "caption" of the .json."""
    listed = _json_of(sample)
    several = listed.get("captions")
    if isinstance(several, list) and (texts := _texts(several)):
        return texts
    plain = sample.fields.get("txt", b"").decode("utf-8", errors="replace")
    return _texts([plain]) or _texts([listed.get("caption")])


def _texts(found: list[Any]) -> list[str]:
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def _json_of(sample: StoredSample) -> dict[str, Any]:
    try:
        read = json.loads(sample.fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
