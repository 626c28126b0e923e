"""What a consumer of an exported model must know to read, draw and check its outputs."""

import json
from typing import Any

from torch import Tensor

from shapwrap._version import __version__
from shapwrap.export.exportable import Exportable

PREFIX = "shapwrap."
"""Of every key, so that other tools may add theirs."""


def metadata(module: Exportable, images: Tensor) -> dict[str, str]:
    """Facts of an exported model, each a JSON text under a key that starts with "shapwrap.".

    `version`, `values` ("predicted" or "all"), `unit` ("logits" or "similarities"), `grid` [rows,
    columns], `image_size` and `covered` [height, width] in pixels, `pixels` ("0 to 1" or
    "normalised": what the graph takes), `baseline` (K numbers: values sum to the logits minus
    these), `model`, `masking`, `readout`; and where they are known `mean` and `std` of the channels
    and `class_names`.

    Args:
        module: What `exportable` returns.
        images: Of the size that is exported, [B, C, H, W].
    """
    tower = module.wrapped
    wrapping = tower._wrapping
    facts: dict[str, Any] = {
        "version": __version__,
        "values": module.values,
        "unit": "logits" if module.text_features is None else "similarities",
        "grid": tower.grid_of(images),
        "image_size": (images.shape[-2], images.shape[-1]),
        "covered": tower.covered(images),
        "pixels": "0 to 1" if module.pixels else "normalised",
        "baseline": module.baseline.tolist(),
        "model": type(tower.model).__name__,
        "masking": wrapping.masking,
        "readout": wrapping.head.readout.name,
    }
    if module.normalization is not None:
        facts["mean"], facts["std"] = module.normalization
    if module.class_names is not None:
        facts["class_names"] = module.class_names
    return {PREFIX + key: json.dumps(fact, ensure_ascii=False) for key, fact in facts.items()}
