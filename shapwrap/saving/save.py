"""`save_pretrained`: a wrapped model as a folder of safetensors, JSON and a model card."""

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shapwrap.backbones.stride_one import native_strides
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import ArgumentError
from shapwrap.saving import backbone
from shapwrap.saving.adapters import adapters_aside, describe_adapters
from shapwrap.saving.card import model_card, numbers
from shapwrap.saving.config import Config, versions
from shapwrap.saving.files import write
from shapwrap.saving.tokenizer import describe_tokenizer
from shapwrap.saving.weights import changed, collect, common_dtype, digest_of
from shapwrap.saving.wrapping import facts_of, options_of
from shapwrap.wrapper import ShapleyWrapper


def save_pretrained(
    wrapped: ShapleyWrapper | ShapleyCLIP,
    directory: str | PathLike[str],
    *,
    only_changed: bool,
    base: nn.Module | Mapping[str, Tensor] | None,
    base_weights: str | None,
    architecture: str | None,
    constructor: Mapping[str, Any] | None,
    rebuild: bool,
    measured: Mapping[str, Any] | None,
    dataset: str | None,
    card_data: Mapping[str, Any] | None,
    repo_id: str | None = None,
) -> Path:
    """The folder, written; see `ShapleyWrapper.save_pretrained`."""
    tower = wrapped.tower if isinstance(wrapped, ShapleyCLIP) else wrapped
    tower._check_in_use()
    if not rebuild and (architecture is not None or constructor is not None):
        raise ArgumentError(
            "rebuild=False came with architecture= or constructor=; expected either what rebuilds "
            "the backbone, or that whoever loads passes model=."
        )
    if not only_changed and (base is not None or base_weights is not None):
        raise ArgumentError(
            "base= or base_weights= came without only_changed=True; expected both, or neither."
        )
    with ExitStack() as stack:
        # Described as it was built.
        stack.enter_context(native_strides(tower._wrapping.stride_changes))
        adapters = describe_adapters(tower.model)
        stack.enter_context(adapters_aside(tower.model))
        described = (
            backbone.describe(wrapped.model, architecture=architecture, constructor=constructor)
            if rebuild
            else backbone.given(wrapped.model)
        )
        options = options_of(tower)
    collected = collect(wrapped)
    tensors, weights = collected.tensors, {"complete": True}
    if only_changed:
        tensors = changed(wrapped, collected, base)
        rest = collected.named(tensors, without=True)
        told = (described.get("pretrained_cfg") or {}).get("tag")
        named = base_weights or (told if described["library"] == "timm" else None)
        about = {"count": len(rest), "sha256": digest_of(rest)}
        weights = {"complete": False, "base": named, "rest": about}
    config = Config(
        kind=type(wrapped).__name__ if isinstance(wrapped, ShapleyCLIP) else "ShapleyWrapper",
        backbone=described,
        options=options,
        facts=facts_of(tower),
        weights=weights,
        dtype=common_dtype(collected.tensors),
        tied=collected.tied,
        class_names=None if isinstance(wrapped, ShapleyCLIP) else wrapped.class_names,
        adapters=adapters,
        tokenizer=describe_tokenizer(getattr(wrapped, "tokenizer", None))
        if isinstance(wrapped, ShapleyCLIP)
        else None,
        data=_data(wrapped),
        measured=numbers(measured),
        versions=versions(),
    )
    folder = Path(directory)
    write(folder, tensors, config.to_json(), model_card(config, repo_id, dataset, card_data))
    return folder


def _data(wrapped: ShapleyWrapper | ShapleyCLIP) -> dict[str, Any]:
    """How images are prepared for the model, as far as it tells."""
    tower = wrapped.tower if isinstance(wrapped, ShapleyCLIP) else wrapped
    channels = tower._wrapping.backbone.in_channels(tower.image_size)
    found: dict[str, Any] = {"input_size": [channels, *tower.image_size]}
    if (normalization := wrapped.normalization) is not None:
        found |= {"mean": list(normalization.mean), "std": list(normalization.std)}
    told = getattr(tower.model, "pretrained_cfg", None) or getattr(
        tower.model, "preprocess_cfg", None
    )
    for name in ("interpolation", "crop_pct", "crop_mode", "resize_mode"):
        value = told.get(name) if isinstance(told, dict) else None
        if isinstance(value, str | float):
            found[name] = value
    return found
