"""Model-parameter randomisation: whether a map depends on what the model has learned."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.explainers.explained_model import Model
from shapwrap.metrics.correlation import spearman
from shapwrap.metrics.cost import MethodCall
from shapwrap.metrics.layers import layers_by_name, layers_from_output, parameters_read
from shapwrap.metrics.protocol import Protocol

Order = Literal["cascading", "independent"]
Drawing = Literal["normal", "permutation"]


class Randomisation(NamedTuple):
    """Similarity of each map to that of the trained model; high after randomisation is bad."""

    layers: tuple[str, ...]
    """Names of the randomised modules, from the output to the input; "" is the model's own."""
    similarity: Float[Tensor, "layers batch"]
    """Spearman's rho of the values; NaN where a map is constant."""
    absolute_similarity: Float[Tensor, "layers batch"]
    """Spearman's rho of their magnitudes."""
    undefined: int
    """Entries of `similarity` that are NaN."""
    protocol: Protocol
    """Every choice, in words."""


def randomisation(
    model: Model,
    make_explainer: Callable[[nn.Module], MethodCall],
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    order: Order | str = "cascading",
    layers: Sequence[str] | None = None,
    drawing: Drawing | str = "normal",
    generator: torch.Generator | None = None,
) -> Randomisation:
    """Explain the model while its parameters are replaced by random ones, layer by layer.

    Parameters are replaced in place and restored bit by bit, also after an error; buffers, such as
    the statistics of batch normalisation, stay. The class is that of the trained model throughout.

    Args:
        model: The trained model, wrapped or plain.
        make_explainer: From the model to a callable on images and target that returns an
            `Explanation`; called anew for each state of the model.
        images: Float [B, C, H, W], normalised.
        target: Class index, or one an image; the class predicted by the trained model if None.
        order: "cascading" randomises from the output layer down to the input and keeps what is
            random already; "independent" randomises one layer at a time.
        layers: Names of modules, randomised with all that they contain, output first; by default
            every module that owns parameters which the model reads, the last one read first.
        drawing: "normal" draws with the mean and standard deviation of the tensor, "permutation"
            shuffles its entries.
        generator: Source of randomness, on the CPU; a new one with seed 0 if None.

    Raises:
        BackboneTypeError: The model is not a module.
        ArgumentError: An unknown option or layer.

    References:
        Adebayo et al. 2018, "Sanity Checks for Saliency Maps", section 3.
    """
    if not isinstance(model, nn.Module):
        raise BackboneTypeError(
            f"model is {type(model).__name__}; expected an nn.Module, whose parameters can be "
            "randomised."
        )
    for name, choice, known in (
        ("order", order, ("cascading", "independent")),
        ("drawing", drawing, ("normal", "permutation")),
    ):
        if choice not in known:
            raise ArgumentError(f"{name} is {choice!r}; expected one of {known}.")
    generator = generator or torch.Generator().manual_seed(0)
    explainer = make_explainer(model)
    with parameters_read(model) as read:
        explanation = explainer(images, target)
    trained, classes = explanation.values, explanation.target
    if layers is None:
        groups = layers_from_output(model, images, read)
    else:
        groups = layers_by_name(model, layers)
    rows = []
    with restored(model) as restore:
        for parameters in groups.values():
            if order == "independent":
                restore()
            randomise(parameters, drawing, generator)
            rows.append(make_explainer(model)(images, classes).values)
    similarity = torch.stack([spearman(trained, row) for row in rows])
    absolute = torch.stack([spearman(trained.abs(), row.abs()) for row in rows])
    undefined = int(similarity.isnan().sum())
    if undefined:
        warnings.warn(
            f"{undefined} of {similarity.numel()} similarities are undefined: a map is constant.",
            stacklevel=2,
        )
    settings = {
        "similarity": "Spearman's rho with the map of the trained model",
        "order": f"{order}, {len(groups)} layers" + (", given" if layers is not None else ""),
        "drawing": drawing,
        "class": "predicted by the trained model" if target is None else "given",
        "images": f"{tuple(images.shape)}, {images.dtype}, {images.device.type}",
        "seed": str(generator.initial_seed()),
    }
    protocol = Protocol.of("randomisation", settings)
    return Randomisation(tuple(groups), similarity, absolute, undefined, protocol)


def randomise(
    parameters: Sequence[nn.Parameter], drawing: Drawing | str, generator: torch.Generator
) -> None:
    """New values, in place."""
    for parameter in parameters:
        old = parameter.detach()
        if drawing == "permutation":
            order = torch.randperm(old.numel(), generator=generator).to(old.device)
            new = old.flatten()[order].view_as(old)
        else:
            exact = old.double()
            noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
            new = exact.mean() + exact.std(correction=0) * noise.to(old.device)
        with torch.no_grad():
            parameter.copy_(new)


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Parameters are on leaving what they were on entering, and whenever the function is called."""
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]

    @torch.no_grad()
    def restore() -> None:
        for parameter, values in kept:
            parameter.copy_(values)

    try:
        yield restore
    finally:
        restore()
