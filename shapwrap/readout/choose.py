"""Which readout a pretrained head admits, found by probing it with random vectors."""

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from shapwrap.errors import ReadoutError
from shapwrap.readout.readouts import (
    AffineReadout,
    GapReadout,
    PreLogitFunction,
    Readout,
    ReadoutName,
    SharedNormReadout,
)
from shapwrap.readout.trace import layers_that_run

TOLERANCE = 1e-4
"""Largest error of a readout on random vectors, relative to how much those differ."""


def choose_readout(
    pre_logits: PreLogitFunction,
    modules: Sequence[nn.Module],
    like: Tensor,
    requested: str = "auto",
    project: PreLogitFunction | None = None,
) -> Readout:
    """The most local readout that is exact for these layers, or the one that was asked for.

    Args:
        pre_logits: The layers between pooling and classifier.
        modules: Where their submodules can be found.
        like: Pooled features [M, D], M >= 1, of the kind that the layers get.
        requested: "auto" or a readout's name.
        project: The last of these layers, if they come apart.

    Raises:
        ReadoutError: Unknown, or not exact for this head.
    """
    if requested != "auto" and requested not in get_args(ReadoutName):
        raise ReadoutError(
            f"readout is {requested!r}; expected 'auto' or one of {get_args(ReadoutName)}."
        )
    features = _probes(like)
    flat = features.flatten(0, 1)
    # A layer with weights that changes nothing today (an adapter of zeros) will once it is trained.
    ran = layers_that_run(lambda: pre_logits(flat), modules)
    idle = not any(has_parameters(layer.module()) for layer in ran)
    idle = idle and torch.equal(pre_logits(flat), flat)
    kinds: tuple[Callable[[], Readout | None], ...] = (
        lambda: AffineReadout(pre_logits, idle=idle),
        lambda: _shared_norm(pre_logits, modules, features, project),
        lambda: GapReadout(pre_logits),
    )
    for build in kinds:
        readout = build()
        if readout is None or requested not in ("auto", readout.name):
            continue
        if _is_exact(readout, pre_logits, features):
            return readout
    raise ReadoutError(
        f"readout={requested!r} is not exact for this head: its patch scores do not average to "
        "what the pretrained layers give. Use readout='auto', or 'gap', which fits any head."
    )


def _probes(like: Tensor) -> Tensor:
    """Random patch features, [scales, patches, D], around `like`.

    Any smooth layer is affine on a small enough scale (an untrained network may have features of
    1e-10), so the probes spread over several.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 6, like.shape[-1], generator=generator).to(like)
    spread = like.std(correction=0)
    scales = torch.stack((spread + 1e-6, spread.clamp(min=1.0), spread.clamp(min=1.0) * 10))
    return like.mean(dim=0) + noise * scales[:, None, None]


def _is_exact(readout: Readout, pre_logits: PreLogitFunction, features: Tensor) -> bool:
    """Whether scores average to the pre-logits of the mean, at every scale of the probes."""
    expected = pre_logits(features.mean(dim=1))
    if readout.pooled(features.mean(dim=1)).shape != expected.shape:
        return False
    alone = pre_logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    # What the layers do to differences between patches; a large bias must not hide an error.
    size = (alone - alone.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2))
    rounding = 1e-6 * expected.abs().amax(dim=1)
    errors = torch.stack(
        (
            (readout.shares(features).mean(dim=1) - expected).abs().amax(dim=1),
            (readout.pooled(features.mean(dim=1)) - expected).abs().amax(dim=1),
        )
    )
    return bool((errors <= TOLERANCE * size + rounding).all())


def _shared_norm(
    pre_logits: PreLogitFunction,
    modules: Sequence[nn.Module],
    features: Tensor,
    project: PreLogitFunction | None,
) -> Readout | None:
    """A readout around the normalisation that runs right after pooling, before affine layers."""
    layers = layers_that_run(lambda: pre_logits(features.flatten(0, 1)), modules)
    first = next((layer for layer in layers if layer.changed_input), None)
    if first is None or not _acts_on_channels(first.module(), features.shape[-1]):
        return None
    for centred in (True, False):
        readout = SharedNormReadout(pre_logits, first.module, centred=centred, project=project)
        if _is_exact(readout, pre_logits, features):
            return readout
    return None


def has_parameters(layer: nn.Module) -> bool:
    """Whether a layer can be trained."""
    return next(layer.parameters(), None) is not None


def _acts_on_channels(layer: nn.Module, channels: int) -> bool:
    """Whether the weights of the layer, if any, are one number a channel, as a norm's are."""
    return all(parameter.shape == (channels,) for parameter in layer.parameters())
