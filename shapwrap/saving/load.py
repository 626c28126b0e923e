"""`from_pretrained`: a wrapped model from a folder or from the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import BackboneTypeError, SavedModelError, ShapwrapError
from shapwrap.saving import backbone
from shapwrap.saving.adapters import insert_adapters
from shapwrap.saving.config import Config, from_json
from shapwrap.saving.files import CONFIG, WEIGHTS, read_config, read_weights
from shapwrap.saving.tokenizer import build_tokenizer
from shapwrap.saving.weights import BACKBONE, align, check_fit, digest_of
from shapwrap.saving.wrapping import wrap_again
from shapwrap.wrapper import ShapleyWrapper

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What JSON of another form leads to."""


@dataclass(frozen=True)
class Parts:
    """What whoever loads passes, because it was not saved, or to use instead."""

    model: nn.Module | None = None
    features: Any = None
    head: Any = None
    tokenizer: Any = None


def load_folder(
    folder: Path,
    parts: Parts,
    *,
    device: str | torch.device | None,
    trust: bool,
) -> ShapleyWrapper | ShapleyCLIP:
    """The wrapped model of a folder, in eval mode; see `ShapleyWrapper.from_pretrained`."""
    if not (folder / CONFIG).is_file():
        raise SavedModelError(_not_there(folder))
    where = str(folder / CONFIG)
    config = from_json(read_config(folder / CONFIG), where)
    _check_parts(config, parts)
    tensors = read_weights(folder / WEIGHTS, config.weights)
    try:
        for alias, name in config.tied.items():
            if name in tensors:
                tensors[alias] = tensors[name]
        return _assemble(config, tensors, parts, device, trust)
    except ShapwrapError:
        raise
    except MALFORMED as error:
        raise SavedModelError(
            f"{where} does not describe a model ({type(error).__name__}: {error}); expected what "
            "save_pretrained writes. It is damaged or was changed."
        ) from error


def _assemble(
    config: Config,
    tensors: dict[str, Tensor],
    parts: Parts,
    device: str | torch.device | None,
    trust: bool,
) -> ShapleyWrapper | ShapleyCLIP:
    weights = config.weights
    complete = weights["complete"] is True
    rest = 0 if complete else int(weights["rest"]["count"])
    model = parts.model
    if model is None:
        pretrained = None if complete else weights["base"]
        if not complete and pretrained is None:
            raise SavedModelError(
                "the folder holds what fine-tuning changed, and not of which pretrained weights; "
                "expected model=, the pretrained backbone that was fine-tuned."
            )
        model = backbone.build(config.backbone, trust=trust, pretrained=pretrained)
    if config.dtype is not None:
        # Buffers that are not stored too.
        model.to(_dtype(config.dtype))
    if device is not None:
        model.to(device)
    _load_backbone(model, tensors)
    model.eval()
    tokenizer = parts.tokenizer
    if tokenizer is None:
        tokenizer = build_tokenizer(config.tokenizer)
    wrapped = wrap_again(
        model,
        config,
        features=parts.features,
        head=parts.head,
        tokenizer=tokenizer,
        trust=trust,
    )
    if config.adapters is not None:
        insert_adapters(wrapped, config.adapters)
    state = wrapped.state_dict()
    check_fit(tensors, state, rest, type(model).__name__)
    align(wrapped, tensors)
    wrapped.load_state_dict(tensors, strict=False)
    if not complete:
        kept = {name: tensor for name, tensor in state.items() if name not in tensors}
        if digest_of(kept) != weights["rest"]["sha256"]:
            raise SavedModelError(
                f"the weights of {type(model).__name__} that fine-tuning left alone are not those "
                f"that were there when the model was saved (pretrained: {weights['base']!r}); "
                "expected the very weights that were fine-tuned. Pass model= with them."
            )
    return wrapped.eval()


def _load_backbone(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what fits before wrapping, which looks at what the model does.

    Raises:
        SavedModelError: A tensor of another shape.
    """
    # An adapted layer is a plain one until it is wrapped.
    own = {
        name.removeprefix(BACKBONE).replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if name.startswith(BACKBONE)
    }
    state = model.state_dict()
    known = {name: tensor for name, tensor in own.items() if name in state}
    check_fit(known, state, len(state) - len(known), type(model).__name__)
    align(model, known)
    model.load_state_dict(known, strict=False)


def _check_parts(config: Config, parts: Parts) -> None:
    model = parts.model
    if isinstance(model, ShapleyWrapper | ShapleyCLIP):
        raise BackboneTypeError(
            "model= is wrapped already; expected the backbone alone, which is wrapped as it was "
            "when it was saved."
        )
    if model is not None and not isinstance(model, nn.Module):
        raise BackboneTypeError(
            f"model= is {model!r:.60}; expected an instance of the backbone, an nn.Module."
        )
    if config.kind == "ShapleyCLIP" and (parts.features is not None or parts.head is not None):
        raise SavedModelError(
            "features= and head= came, but the folder holds a ShapleyCLIP, which takes neither."
        )
    if config.kind == "ShapleyWrapper" and parts.tokenizer is not None:
        raise SavedModelError(
            "tokenizer= came, but the folder holds a ShapleyWrapper, which reads no texts."
        )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SavedModelError(f"the weights are of dtype {name!r}; expected a floating-point one.")
    return found


def _not_there(folder: Path) -> str:
    if any(folder.glob("step-*/manifest.json")) or (folder / "manifest.json").is_file():
        return (
            f"{folder} holds checkpoints of a training run, which do not say how its model is "
            "built. Go on from them with fit(resume=True) in the script that began it (shapwrap "
            "train --resume), and save its model: trainer.wrapped.save_pretrained(folder)."
        )
    return f"{folder} has no {CONFIG}; expected a folder that save_pretrained wrote."
