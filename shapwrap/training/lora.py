"""Low-rank adapters (LoRA) of a wrapped model, through peft."""

import math
import re
from typing import Any, Literal, get_args

import torch
from torch import nn

from shapwrap.arguments import check_at_least
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    MissingDependencyError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.probing import random_images, undisturbed
from shapwrap.training.random_stream import global_states_kept
from shapwrap.training.token_layers import called, coalitions_of_halves, token_layers
from shapwrap.training.trainable import head_of
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.wrapping import unused_parameters

try:
    from peft import LoraConfig, PeftModel, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise MissingDependencyError(
        "adapters are peft's; install it with pip install 'shapwrap[lora]'."
    ) from error

Targets = Literal["all", "attention", "mlp"]
ADAPTER = "default"


def add_lora(
    wrapped: ShapleyWrapper | ShapleyCLIP,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Targets | str = "all",
    generator: torch.Generator | None = None,
) -> list[str]:
    """The names of the layers in `wrapped.model` that got an adapter, those of attention first.

    Adapters start at zero: logits and patch values stay as they were. From then on only adapters
    and head require gradients; give them to a Trainer, or a loop of your own. `merge_lora` makes
    ordinary layers of them.

    The layers are found by running the model, see `token_layers`. An nn.MultiheadAttention gets
    one for its joint projection and one for its output, as peft has them: its own weights are
    added to and subtracted from in each pass, and so move by rounding.

    Args:
        wrapped: A wrapped model; of a `ShapleyCLIP`, the image tower gets adapters, and what is
            outside of it stays as trainable as it was.
        rank: Of the product that is added to each weight.
        alpha: The product is multiplied by alpha / rank; by default by 1.
        dropout: On what an adapter reads.
        targets: Linear layers of the "attention", of the "mlp", or "all" of both.
        generator: On the CPU, for the first factors of the products; a new one with seed 0 if None.

    Raises:
        BackboneTypeError: Not a wrapped model.
        ArgumentError: An option outside its range, or adapters that are there already.
        UnsupportedBackboneError: The model has no such layer, or not all adapters would be used.
    """
    wrapped = _tower(wrapped)
    _check(wrapped, rank, alpha, dropout, targets)
    layers = token_layers(wrapped)
    names = layers.of(targets)
    model = wrapped.model
    if not names:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} calls no linear layer of kind {targets!r} on its patches "
            f"({len(layers.attention)} of attention, {len(layers.mlp)} of MLPs were found); "
            "expected a transformer, or a model with MLPs of linear layers. Use layer_decay=, or "
            "trainable='head', or peft on the model before it is wrapped."
        )
    before = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    put_adapters(
        wrapped,
        names,
        rank=rank,
        alpha=rank if alpha is None else alpha,
        dropout=dropout,
        generator=generator,
    )
    if idle := _idle(wrapped):
        _remove(model, merge=False)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(before[name])
        raise UnsupportedBackboneError(
            f"the adapters of {', '.join(idle[:3])} would be without effect: "
            f"{type(model).__name__} holds these layers elsewhere, too. Put adapters on the model "
            "with peft before it is wrapped."
        )
    return names


def put_adapters(
    wrapped: ShapleyWrapper,
    names: list[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator | None = None,
) -> None:
    """Adapters for exactly these layers of `wrapped.model`; they and the head require gradients.

    Args:
        wrapped: A wrapped model without adapters.
        names: Of linear layers, or of nn.MultiheadAttention.
        rank: As in `add_lora`.
        alpha: As in `add_lora`.
        dropout: As in `add_lora`.
        generator: As in `add_lora`.
    """
    model = wrapped.model
    modes = {name: module.training for name, module in model.named_modules()}
    config = configuration_of(names, rank=rank, alpha=alpha, dropout=dropout)
    with global_states_kept():
        inject_adapter_in_model(config, model, ADAPTER)
    for name, layer in adapted_layers(model):
        layer.train(modes[name])
    _draw(model, generator or torch.Generator().manual_seed(0))
    learning = {id(parameter) for parameter in [*_factors(model), *head_of(wrapped)]}
    for parameter in wrapped.parameters():
        parameter.requires_grad_(id(parameter) in learning)


def configuration_of(names: list[str], *, rank: int, alpha: float, dropout: float) -> LoraConfig:
    """What peft is told of the adapters of exactly these layers."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        # A pattern, since in a list each name would stand for all that end in it.
        target_modules="|".join(map(re.escape, names)),
    )


def merge_lora(wrapped: ShapleyWrapper | ShapleyCLIP) -> list[str]:
    """The names of the layers whose adapters became part of their weights.

    Logits stay as they are, up to rounding, and `unwrap()` returns an ordinary model. Everything
    that the wrapped model reads requires gradients then, as after wrapping.

    Args:
        wrapped: With adapters of `add_lora`, or of `peft.inject_adapter_in_model` before wrapping.

    Raises:
        BackboneTypeError: Not a wrapped model.
        ArgumentError: There are no adapters, or they belong to a `PeftModel`.
        TrainingError: An adapter is not finite.
    """
    wrapped = _tower(wrapped)
    if isinstance(wrapped.model, PeftModel):
        raise ArgumentError(
            "the adapters belong to a PeftModel, which was wrapped; merge them with "
            "wrapped.unwrap().merge_and_unload(), and wrap the result."
        )
    names = [name for name, _ in adapted_layers(wrapped.model)]
    if not names:
        raise ArgumentError(
            f"{type(wrapped.model).__name__} has no adapters; expected a model after add_lora()."
        )
    # All of them before the first is merged: a half-merged model would be neither.
    if odd := [name for name, layer in adapted_layers(wrapped.model) if not _is_finite(layer)]:
        raise TrainingError(
            f"the adapters cannot be merged: that of {odd[0]} is not finite ({len(odd)} of "
            f"{len(names)} in all). Go back to an earlier checkpoint."
        )
    _remove(wrapped.model, merge=True)
    unused = {id(p) for p in unused_parameters(wrapped._wrapping, wrapped.new_head)}
    for parameter in wrapped.parameters():
        parameter.requires_grad_(id(parameter) not in unused)
    return names


def _tower(wrapped: object) -> ShapleyWrapper:
    if isinstance(wrapped, ShapleyCLIP):
        return wrapped.tower
    if not isinstance(wrapped, ShapleyWrapper):
        raise BackboneTypeError(
            f"wrapped is {type(wrapped).__name__}; expected ShapleyWrapper(model). Put adapters on "
            "a plain model with peft itself."
        )
    return wrapped


def _check(
    wrapped: ShapleyWrapper, rank: int, alpha: float | None, dropout: float, targets: str
) -> None:
    check_at_least("rank", rank, 1)
    if alpha is not None and not alpha > 0:
        raise ArgumentError(f"alpha is {alpha}; expected more than 0, or None.")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout is {dropout}; expected at least 0 and less than 1.")
    if targets not in get_args(Targets):
        raise ArgumentError(f"targets is {targets!r}; expected one of {get_args(Targets)}.")
    if any(isinstance(module, BaseTunerLayer) for module in wrapped.model.modules()):
        raise ArgumentError(
            f"{type(wrapped.model).__name__} has adapters already; expected none. Train those, or "
            "merge_lora() first."
        )


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters by name; not those within another one."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, LoraLayer) and not inside:
            found.append((name, module))
    return found


def _factors(model: nn.Module) -> list[nn.Parameter]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    products = [product for layer in layers for product in (layer.lora_A, layer.lora_B)]
    return [parameter for product in products for parameter in product.parameters()]


def _is_finite(layer: nn.Module) -> bool:
    return all(bool(factor.isfinite().all()) for factor in _factors(layer))


def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """The first factors as peft draws them, but from this generator."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for factor in [factor for layer in layers for factor in layer.lora_A.values()]:
        drawn = torch.empty(factor.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            factor.weight.copy_(drawn)


def _idle(wrapped: ShapleyWrapper) -> list[str]:
    """Adapted layers that the wrapped model does not call."""
    adapted = adapted_layers(wrapped.model)
    images = random_images(wrapped._wrapping.backbone, wrapped.image_size, batch=1)
    with undisturbed(wrapped.model), called([layer for _, layer in adapted]) as used:
        wrapped(images, coalitions_of_halves(wrapped), paired=True)
    return [name for name, layer in adapted if layer not in used]


def _remove(model: nn.Module, *, merge: bool) -> None:
    """Put the layers back in the places of the adapted ones, with or without what was learned."""
    for name, layer in adapted_layers(model):
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            plain = layer.unload_and_optionally_merge_module(
                merge=merge, safe_merge=False, adapter_names=None
            )
        else:
            if merge:
                layer.merge()
            plain = layer.get_base_layer()
        model.set_submodule(name, plain)
    if "peft_config" in vars(model):
        del model.peft_config
