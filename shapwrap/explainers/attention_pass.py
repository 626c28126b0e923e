"""Attention, its gradient and token states of a batch, from one forward and one backward pass."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Images
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_checks import OTHERS, check_residual_stream, check_shapes
from shapwrap.explainers.attention_recorder import AttentionRecorder
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.explicit_attention import Projection, Values, Weights
from shapwrap.masking.batch_norm import without_recomputation
from shapwrap.masking.pooling import compute_dtype

States = Float[Tensor, "batch tokens features"]
"""The residual stream."""


class Pooling(NamedTuple):
    """Attention by which a head reads the tokens."""

    weights: Weights
    gradient: Weights
    read: Float[Tensor, "batch queries"]
    """Equal shares of the queries that the logit depends on."""


@dataclass(frozen=True)
class Block:
    """One attention and the additions that follow it; everything float32 or float64, detached."""

    weights: Weights
    """A, rows are queries."""
    gradient: Weights
    """d f_c / d A."""
    tokens: States
    """What attention is added to: the input of the block."""
    token_gradient: States
    """d f_c / d tokens."""
    values: Values
    projection: Projection | None
    scale: Tensor | None
    branches: list[tuple[States, States]]
    """Tokens, and what was added to them: by attention, then by the MLP."""


@dataclass(frozen=True)
class AttentionPass:
    """What a forward pass and the gradient of the target logit show."""

    blocks: list[Block]
    read: Float[Tensor, "batch tokens"]
    """Equal shares of the tokens that the head reads; with attention pooling unused."""
    pooling: Pooling | None
    num_prefix: int
    """Class, distillation and register tokens at the start."""


def attention_pass(
    model: ExplainedModel,
    images: Images,
    target: Int[Tensor, " batch"],
    num_patches: int,
    prefix: Sequence[int],
) -> AttentionPass:
    """Runs the model once, in eval mode, and looks.

    Args:
        model: Any whose blocks are tokens + attention(tokens), each over all tokens.
        images: Checked.
        target: One class an image.
        num_patches: N; the last N tokens are the patches.
        prefix: Numbers of tokens before the patches that would be right.

    Raises:
        UnsupportedBackboneError: Attention of another shape, or computed in another way.
    """
    batch = len(images)
    recorder, score = _run(model, images, target)
    if any(layer.weights.shape[-1] == len(layer.weights) for layer in recorder.layers):
        # Tokens first or batch first? One more image tells.
        images, target = torch.cat((images, images[:1])), torch.cat((target, target[:1]))
        recorder, score = _run(model, images, target)
    num_prefix = check_shapes(recorder, len(images), num_patches, prefix)
    check_residual_stream(recorder.layers)
    layers, pooled = recorder.layers, [weights for _, weights in recorder.poolings]
    attention = [layer.weights for layer in layers]
    tokens = [layer.additions[0].shortcut for layer in layers]
    last = layers[-1].additions[-1].result
    gradients = _gradients(score, [*attention, *tokens, last, *pooled])
    depth = len(layers)

    def clean(tensor: Tensor) -> Tensor:
        return tensor.detach().to(compute_dtype(tensor))

    def states(tensor: Tensor) -> Tensor:
        batch_first = len(tensor) == len(images)
        return clean(tensor if batch_first else tensor.transpose(0, 1))[:batch]

    blocks = [
        Block(
            weights=clean(layer.weights)[:batch],
            gradient=clean(gradient)[:batch],
            tokens=states(layer.additions[0].shortcut),
            token_gradient=states(token_gradient),
            values=clean(layer.values)[:batch],
            projection=_detached(layer.projection),
            scale=None if layer.scale is None else clean(layer.scale),
            branches=[(states(a.shortcut), states(a.branch)) for a in layer.additions],
        )
        for layer, gradient, token_gradient in zip(
            layers, gradients[:depth], gradients[depth : 2 * depth], strict=True
        )
    ]
    read, pooling = _shares(states(gradients[2 * depth]).abs().sum(dim=2)), None
    if pooled:
        gradient = clean(gradients[-1])[:batch]
        pooling = Pooling(clean(pooled[0])[:batch], gradient, _shares(gradient.abs().sum((1, 3))))
    return AttentionPass(blocks, read, pooling, num_prefix)


def _run(
    model: ExplainedModel, images: Images, target: Int[Tensor, " batch"]
) -> tuple[AttentionRecorder, Tensor]:
    """The recorder, and the sum of the target logits, whose gradient holds every image's own."""
    recorder = AttentionRecorder()
    images = images.detach().requires_grad_()
    module = model.module
    plain = nullcontext() if module is None else without_recomputation(module)
    with torch.enable_grad(), plain:
        with recorder:
            logits = model.logits(images)
        return recorder, logits.gather(1, target[:, None]).sum()


def _gradients(score: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    cut = not score.requires_grad or not all(tensor.requires_grad for tensor in inputs)
    found = None if cut else torch.autograd.grad(score, inputs, allow_unused=True)
    if found is None or any(gradient is None for gradient in found):
        raise UnsupportedBackboneError(
            "the gradient of the logit does not reach every attention; expected a forward pass "
            f"without torch.no_grad and detach after the patch embedding. {OTHERS}"
        )
    return list(found)


def _shares(size: Float[Tensor, "batch items"]) -> Float[Tensor, "batch items"]:
    """Equal shares of the items on which the logit depends at all."""
    read = (size > 0).to(size.dtype)
    total = read.sum(dim=1, keepdim=True)
    if not total.all():
        raise UnsupportedBackboneError(
            "the logit depends on no token; expected a trained head. A new one "
            "(num_classes=) is zero at first: train it, then explain."
        )
    return read / total


def _detached(projection: Projection | None) -> Projection | None:
    if projection is None:
        return None
    weight, bias = projection
    dtype = compute_dtype(weight)
    return Projection(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
