"""How a model was wrapped: the arguments that were given, and what came of them."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.choosing import Masking
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import SavedModelError, ShapwrapError
from shapwrap.readout.readouts import ReadoutName
from shapwrap.saving.config import Config
from shapwrap.saving.heads import build_head, describe_head
from shapwrap.wrapper import ShapleyWrapper

_CLIP_OPTIONS = ("masking", "prefix_tokens")


def facts_of(wrapped: ShapleyWrapper) -> dict[str, Any]:
    """What a wrapped model is, as JSON."""
    wrapping = wrapped._wrapping
    backbone = wrapping.backbone
    return {
        "masking": wrapping.masking,
        "readout": wrapping.head.readout.name,
        "prefix_tokens": backbone.prefix_tokens if isinstance(backbone, TokenBackbone) else None,
        "grid": list(wrapping.grid),
        "image_size": list(wrapping.image_size),
        "num_classes": wrapped.num_classes,
    }


def options_of(wrapped: ShapleyWrapper) -> dict[str, Any]:
    """The arguments of the wrapper, as JSON.

    Functions are not stored, only that there were some: who loads passes them again.

    Raises:
        SavedModelError: A head whose arguments are not known.
        ArgumentError: A head whose class cannot be imported by a name.
    """
    request = wrapped._wrapping.request
    head: Any = None
    own: dict[Any, str] = {module: name for name, module in wrapped.model.named_modules()}
    if isinstance(request.head, str):
        head = {"name": request.head}
    elif request.features is not None and request.head in own:
        head = {"name": own[request.head]}
    if head is None and isinstance(request.head, nn.Module):
        head = describe_head(request.head)
    elif head is None and request.head is not None:
        head = {"given": _name(request.head)}
    features = request.features
    if features is not None and not isinstance(features, str):
        features = {"given": _name(features)}
    return {
        "masking": request.masking,
        "readout": request.readout,
        "prefix_tokens": request.prefix_tokens,
        "features": features,
        "head": head,
        "num_classes": request.num_classes,
    }


def wrap_again(
    model: nn.Module,
    config: Config,
    *,
    features: Callable[..., Any] | None,
    head: Any,
    tokenizer: Any,
    trust: bool,
) -> ShapleyWrapper | ShapleyCLIP:
    """The model, wrapped as it was.

    The arguments are those that were given; should they lead elsewhere, in another version of a
    library, those that say explicitly what came of them.

    Raises:
        SavedModelError: It cannot be wrapped so, with what differs.
    """
    asked, facts = config.options, config.facts
    _check_known(asked, facts)
    common = {"grid": tuple(facts["grid"]), "image_size": tuple(facts["image_size"])}
    if config.kind == "ShapleyCLIP":
        names, cls, more = _CLIP_OPTIONS, ShapleyCLIP, {"tokenizer": tokenizer}
    else:
        names, cls = ("masking", "readout", "prefix_tokens"), ShapleyWrapper
        more = {
            "features": _part("features", asked["features"], features, trust),
            "head": _part("head", asked["head"], head, trust),
            "num_classes": asked["num_classes"],
            "class_names": config.class_names,
        }
    explicit = {name: facts[name] or "auto" for name in names}
    faults: list[str] = []
    for options in ({name: asked[name] for name in names}, explicit):
        try:
            wrapped = cls(model, **options, **common, **more)
        except ShapwrapError as error:
            faults.append(str(error))
            continue
        tower = wrapped.tower if isinstance(wrapped, ShapleyCLIP) else wrapped
        came = facts_of(tower)
        if came == facts:
            return wrapped
        other = [f"{n} is {came[n]}, saved {facts.get(n)}" for n in came if came[n] != facts.get(n)]
        faults.append("; ".join(other))
        wrapped.unwrap()
    raise SavedModelError(
        f"{type(model).__name__} is not wrapped as it was saved: {faults[0]}. It was saved with "
        f"{_said(config)}; expected these versions, and the backbone that was saved."
    )


def _check_known(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for name, known in (("masking", get_args(Masking)), ("readout", get_args(ReadoutName))):
        for said in (asked[name], facts.get(name)):
            if said not in known and (said != "auto" or said is facts.get(name)):
                raise SavedModelError(
                    f"the model was saved with {name} {said!r}, which this version does not know; "
                    f"expected one of {known}. Load it with the version that wrote it."
                )


def _part(name: str, said: Any, given: Any, trust: bool) -> Any:
    """A part of a model: its name, layers built anew, or what whoever loads passes.

    Raises:
        SavedModelError: It was a function, and none was passed.
    """
    if given is not None:
        return given
    if isinstance(said, dict) and "given" in said:
        raise SavedModelError(
            f"the model was wrapped with {name}= the function {said['given']}, which is not saved; "
            f"pass {name}= with that function again."
        )
    if isinstance(said, dict):
        return said["name"] if "name" in said else build_head(said, trust=trust)
    return said


def _name(function: Any) -> str:
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _said(config: Config) -> str:
    return ", ".join(f"{name} {number}" for name, number in config.versions.items())
