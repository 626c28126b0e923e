"""From the name of a folder or repository to a model of the class that was asked for."""

from os import PathLike
from typing import Any

import torch

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import BackboneTypeError
from shapwrap.saving.config import from_json
from shapwrap.saving.files import CONFIG, read_config
from shapwrap.saving.hub import HubOptions, folder_of
from shapwrap.saving.load import Parts, load_folder


def from_pretrained(
    cls: type,
    source: str | PathLike[str],
    parts: Parts,
    options: HubOptions,
    *,
    device: str | torch.device | None,
    trust: bool,
) -> Any:
    """The wrapped model; see `ShapleyWrapper.from_pretrained`."""
    folder = folder_of(source, options)
    if cls is ShapleyCLIP and (folder / CONFIG).is_file():
        config = from_json(read_config(folder / CONFIG), str(folder / CONFIG))
        if config.kind != "ShapleyCLIP":
            raise BackboneTypeError(
                f"{source} holds a {config.kind}; expected a ShapleyCLIP. Use "
                "ShapleyWrapper.from_pretrained, which loads both."
            )
    return load_folder(folder, parts, device=device, trust=trust)
