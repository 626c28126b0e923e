"""Models of open_clip, or their image towers, by the configuration they are built from."""

import copy
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from shapwrap.errors import ArgumentError, MissingDependencyError, SavedModelError
from shapwrap.saving.arguments import Arguments, find_arguments
from shapwrap.saving.values import decode

_NO_CONFIGURATION = {"custom_text"}
"""Entries of a configuration file that no constructor takes."""


def describe(
    model: nn.Module, architecture: str | None, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Configuration, kind of model and preprocessing; None where no configuration fits.

    Args:
        model: A whole model, or its image tower.
        architecture: Name of the configuration, of `open_clip.list_models()`.
        given: A configuration of one's own, `embed_dim`, `vision_cfg`, `text_cfg`, or further
            arguments.

    Raises:
        ArgumentError: No such name.
        SavedModelError: It does not build this model.
    """
    open_clip = imported()
    part = type(model).__name__ if hasattr(model, "encode_text") else "visual"
    if architecture is not None:
        configuration = open_clip.get_model_config(architecture)
        if configuration is None:
            raise ArgumentError(
                f"architecture is {architecture!r}; expected one of open_clip.list_models()."
            )
        arguments = _arguments(part, {**configuration, **given}, model)
        return _description(part, architecture, arguments, model)
    if "vision_cfg" in given:
        return _description(part, None, _arguments(part, dict(given), model), model)
    found = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    # A tower is named after a model of open_clip's own, where there is one.
    for name in sorted(found, key=lambda name: "hf_model_name" in found[name]["text_cfg"]):
        if not _may_fit(found[name], model):
            continue
        try:
            arguments = _arguments(part, {**found[name], **given}, model, alike=True)
        except SavedModelError:
            continue
        return _description(part, name, arguments, model)
    return None


def build(description: Mapping[str, Any], *, trust: bool, pretrained: str | None) -> nn.Module:
    """The model, or the image tower.

    Raises:
        SavedModelError: A part or a tower that would be looked up on the hub.
        MissingDependencyError: open_clip is not installed.
    """
    open_clip = imported()
    arguments = decode(description["arguments"], trust=trust)
    text = arguments.get("text_cfg") or {}
    if text.get("hf_model_name"):
        raise SavedModelError(
            f"the text tower is {text['hf_model_name']!r} of transformers, which would be looked "
            "up on the hub; expected model=, built by open_clip.create_model."
        )
    trunk = arguments["vision_cfg"].get("timm_model_name")
    if trunk and (not str(trunk).isidentifier() or not timm.is_model(trunk)):
        raise SavedModelError(
            f"the image tower is timm's {trunk!r}, which timm {timm.__version__} does not have; "
            "install the version that it was saved with."
        )
    part = description["part"]
    if pretrained:
        name = description.get("architecture")
        if name not in open_clip.list_models() or part == "visual":
            raise SavedModelError(
                f"pretrained weights {pretrained!r} of an open_clip {part} without an architecture "
                "of open_clip.list_models() cannot be found; expected model= with these weights."
            )
        model: Any = open_clip.create_model(name, pretrained=pretrained)
    else:
        model = _constructor(part)(**arguments)
    visual: Any = model if part == "visual" else model.visual
    for attribute, value in decode(description.get("preprocess") or {}, trust=False).items():
        if attribute in ("image_mean", "image_std", "preprocess_cfg"):
            setattr(visual, attribute, value)
    return model


def vision_tower(
    embed_dim: int, vision_cfg: Mapping[str, Any], quick_gelu: bool = False
) -> nn.Module:
    """The image tower alone, with random weights.

    The public way builds the text tower too, which is the larger part and downloads a tokenizer.

    Args:
        embed_dim: Of the embeddings.
        vision_cfg: As in open_clip's configuration files.
        quick_gelu: As there.
    """
    imported()
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    vision = CLIPVisionCfg(**{**vision_cfg, "timm_model_pretrained": False})
    return _build_vision_tower(embed_dim, vision, quick_gelu)


def imported() -> Any:
    """The library.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "open_clip is not installed; its towers need: pip install 'shapwrap[open-clip]'"
        ) from error
    return open_clip


def _constructor(part: object) -> Any:
    if part == "visual":
        return vision_tower
    open_clip = imported()
    if part not in ("CLIP", "CustomTextCLIP", "CoCa"):
        raise SavedModelError(
            f"the model is an open_clip {part!r}; expected CLIP, CustomTextCLIP, CoCa or visual. "
            "Pass model= to build it yourself."
        )
    return getattr(open_clip, str(part))


def _arguments(
    part: str, configuration: Arguments, model: nn.Module, *, alike: bool = False
) -> Arguments:
    configuration = copy.deepcopy(configuration)
    for name in _NO_CONFIGURATION:
        configuration.pop(name, None)
    configuration["vision_cfg"]["timm_model_pretrained"] = False
    if part == "visual":
        kept = ("embed_dim", "vision_cfg", "quick_gelu")
        configuration = {name: configuration[name] for name in kept if name in configuration}
    elif configuration.get("text_cfg", {}).get("hf_model_name"):
        raise SavedModelError(
            f"the text tower of {type(model).__name__} is a model of transformers, which cannot be "
            "rebuilt without the hub; pass rebuild=False, and model= to from_pretrained."
        )
    return find_arguments(_constructor(part), model, configuration, alike=alike)


def _description(
    part: str, architecture: str | None, arguments: Arguments, model: nn.Module
) -> dict[str, Any]:
    visual: Any = model if part == "visual" else model.visual
    names = ("image_mean", "image_std", "preprocess_cfg")
    told = {name: getattr(visual, name) for name in names if getattr(visual, name, None)}
    return {
        "library": "open_clip",
        "part": part,
        "architecture": architecture,
        "arguments": arguments,
        "preprocess": told,
    }


def _may_fit(configuration: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether sizes that need no building agree; most configurations are ruled out so."""
    vision, text = configuration["vision_cfg"], configuration["text_cfg"]
    visual: Any = getattr(model, "visual", model)
    size = getattr(visual, "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    asked = vision.get("image_size", 224)
    if sides and sides != ({asked} if isinstance(asked, int) else set(asked)):
        return False
    whole: Any = model
    if hasattr(whole, "encode_text"):
        if text.get("hf_model_name"):
            return False
        length, words = text.get("context_length", 77), text.get("vocab_size", 49408)
        if (getattr(whole, "context_length", length), getattr(whole, "vocab_size", words)) != (
            length,
            words,
        ):
            return False
    shapes = {side for tensor in visual.state_dict().values() for side in tensor.shape}
    width = vision.get("width")
    return configuration["embed_dim"] in shapes and (width is None or width in shapes)
