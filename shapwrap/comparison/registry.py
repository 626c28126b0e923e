"""What a configuration may name: methods and metrics, by where they are defined."""

import importlib
from typing import Any, NamedTuple

from shapwrap.comparison.schema import suggestion
from shapwrap.errors import ConfigurationError


class MethodEntry(NamedTuple):
    """A compared method."""

    path: str
    """"module:class"."""
    models: str
    """Which models it can explain at all: "all", "plain" or "wrapped"."""
    title: str
    """What it is, in a few words."""


METHODS = {
    "shapley": MethodEntry(
        "shapwrap.explainers:SelfExplaining", "wrapped", "the wrapped model's own patch values"
    ),
    "random": MethodEntry("shapwrap.explainers:RandomMap", "all", "random values"),
    "occlusion": MethodEntry("shapwrap.explainers:Occlusion", "all", "drop without each patch"),
    "kernelshap": MethodEntry("shapwrap.explainers:KernelSHAP", "all", "sampled Shapley values"),
    "rise": MethodEntry("shapwrap.explainers:RISE", "all", "mean of random masks"),
    "integrated-gradients": MethodEntry(
        "shapwrap.explainers:IntegratedGradients", "all", "gradients from a baseline on"
    ),
    "input-x-gradient": MethodEntry("shapwrap.explainers:InputXGradient", "all", "one gradient"),
    "idgi": MethodEntry("shapwrap.explainers:IDGI", "all", "important-direction gradients"),
    "grad-cam": MethodEntry("shapwrap.explainers:GradCAM", "all", "weighted feature maps"),
    "attention-grad-cam": MethodEntry(
        "shapwrap.explainers:AttentionGradCAM", "all", "weighted last attention, ViT"
    ),
    "attention-rollout": MethodEntry(
        "shapwrap.explainers:AttentionRollout", "all", "product of attentions, ViT"
    ),
    "game": MethodEntry("shapwrap.explainers:GAME", "all", "generic attention, ViT"),
    "chefer-lrp": MethodEntry("shapwrap.explainers:CheferLRP", "all", "relevance propagation, ViT"),
    "attcat": MethodEntry("shapwrap.explainers:AttCAT", "all", "attentive class activation, ViT"),
    "tokentm": MethodEntry("shapwrap.explainers:TokenTM", "all", "token transformation, ViT"),
    "vit-shapley": MethodEntry(
        "shapwrap.explainers:ViTShapley", "plain", "trained surrogate and explainer, ViT"
    ),
    "fastshap": MethodEntry(
        "shapwrap.explainers:FastSHAP", "all", "trained surrogate and explainer"
    ),
}

METRICS = {
    "faithfulness": "shapwrap.comparison.measures:faithfulness",
    "insertion_deletion": "shapwrap.comparison.measures:insertion_deletion",
    "localisation": "shapwrap.comparison.measures:localisation",
    "shapley_truth": "shapwrap.comparison.truth:shapley_truth",
    "cost": "shapwrap.comparison.measures:cost",
}

DATA = {
    "digits": "shapwrap.comparison.datasets:digits",
    "imagenette": "shapwrap.comparison.datasets:imagenette",
    "folder": "shapwrap.comparison.datasets:folder",
    "pet": "shapwrap.comparison.datasets:pet",
    "imagenet-s": "shapwrap.comparison.datasets:imagenet_s",
    "imagenet-segmentation": "shapwrap.comparison.datasets:imagenet_segmentation",
}


def find_method(name: str) -> MethodEntry:
    """A known method, or "module:class" of one's own.

    Raises:
        ConfigurationError: Unknown.
    """
    if ":" in name:
        return MethodEntry(name, "all", "of your own")
    if name not in METHODS:
        raise ConfigurationError(
            f"{name!r} is no method. {suggestion(name, METHODS)} Your own: 'module:class'."
        )
    return METHODS[name]


def find(name: str, table: dict[str, str], what: str) -> Any:
    """What a name of METRICS or DATA stands for, or "module:attribute" of one's own.

    Raises:
        ConfigurationError: Unknown, or it cannot be imported.
    """
    if ":" not in name and name not in table:
        raise ConfigurationError(
            f"{name!r} is no {what}. {suggestion(name, table)} Your own: 'module:name'."
        )
    return load(table.get(name, name))


def load(path: str) -> Any:
    """The object at "module:attribute".

    Raises:
        ConfigurationError: There is none, or the module does not import.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(f"{path!r} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise ConfigurationError(
            f"{path!r}: {module_name} has no {attribute!r}; expected 'module:name' of a class or "
            "function there."
        )
    return getattr(module, attribute)
