"""Training steps of a wrapped model: gradients arrive where they should, and a step helps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.losses import shapley_loss
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.zoo.checks import SUM_TOLERANCE, passed_if, relative
from shapwrap.zoo.row import Row

STEP_LENGTHS = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
"""Of the step that would take the loss to zero if it were linear. The loss is differentiable, so
a short enough one lowers it."""


def parameters_in_use(model: nn.Module, images: Tensor, head: nn.Module | None) -> set[int]:
    """Identities of the parameters that get a gradient in the original model's own training."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    output = model(images)
    # Inception-style models return auxiliary logits beside the main ones, distilled models two.
    outputs = [output.logits] if hasattr(output, "logits") else _tensors(output)
    if head is not None:
        outputs = [head(tensor) for tensor in outputs]
    sum((tensor.float() ** 2).mean() for tensor in outputs if tensor.requires_grad).backward()  # pyright: ignore[reportAttributeAccessIssue]
    used = {id(p) for p in model.parameters() if p.grad is not None}
    _clear(model.parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            # Running statistics have moved, and the logits with them.
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return used


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _clear(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _loss(wrapped: ShapleyWrapper, images: Tensor, coalitions: Tensor) -> Tensor:
    output = wrapped(images, coalitions)
    labels = torch.arange(len(images)) % output.logits.shape[1]
    return functional.cross_entropy(output.logits, labels) + shapley_loss(output)


def check_gradients(
    row: Row,
    wrapped: ShapleyWrapper,
    images: Tensor,
    in_use: set[int],
    generator: torch.Generator,
) -> None:
    """In train mode every trainable parameter in use gets a finite gradient."""
    wrapped.train()
    coalitions = sample_coalitions(len(images), wrapped.num_patches, generator=generator)
    loss = _loss(wrapped, images, coalitions)
    loss.backward()
    own = {id(parameter) for parameter in wrapped.head_parameters()}
    without, not_finite = [], []
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad or id(parameter) not in in_use | own:
            continue
        if parameter.grad is None:
            without.append(name)
        elif not torch.isfinite(parameter.grad).all():
            not_finite.append(name)
    _clear(wrapped.parameters())
    row.checks["training loss"] = passed_if(
        bool(torch.isfinite(loss)), f"loss is {float(loss.detach())}"
    )
    row.checks["gradients"] = passed_if(
        not without and not not_finite,
        f"none in {_some(without)}" if without else f"not finite in {_some(not_finite)}",
    )


def _some(names: list[str]) -> str:
    return f"{len(names)} parameters, such as {', '.join(names[:3])}"


def check_step(
    row: Row, wrapped: ShapleyWrapper, images: Tensor, generator: torch.Generator
) -> None:
    """In eval mode, with the same coalitions, one gradient step lowers the loss.

    Estimates are compared with the patch values on the way. Leaves the weights changed.
    """
    wrapped.eval()
    coalitions = sample_coalitions(len(images), wrapped.num_patches, generator=generator)
    with torch.no_grad():
        phi = wrapped.attribute(images)
    output = wrapped(images, coalitions)
    sums = torch.einsum("bsn,bnk->bsk", coalitions.to(phi), phi)
    gap = relative(output.estimates.detach() - sums, output.logits.detach())
    row.checks["estimates"] = passed_if(gap <= SUM_TOLERANCE, f"s . phi off by {gap:.2g}")

    start, after = _after_step(wrapped, images, coalitions)
    if not after < start:
        # A loss of thousands hides a short step in single precision.
        start, after = _after_step(wrapped.double(), images.double(), coalitions)
    row.checks["step"] = passed_if(after < start, f"loss {start:.6g} -> {after:.6g}")


def _after_step(wrapped: ShapleyWrapper, images: Tensor, coalitions: Tensor) -> tuple[float, float]:
    """The loss before and after the longest step along the gradient that lowers it, else any."""
    before = _loss(wrapped, images, coalitions)
    before.backward()
    moved = [p for p in wrapped.parameters() if p.grad is not None]
    gradients = [p.grad.detach().clone() for p in moved if p.grad is not None]
    weights = [p.detach().clone() for p in moved]
    _clear(wrapped.parameters())
    squared = sum(float((g.double() ** 2).sum()) for g in gradients)
    start = float(before.detach())
    after = float("nan")
    with torch.no_grad():
        for length in STEP_LENGTHS:
            for parameter, weight, gradient in zip(moved, weights, gradients, strict=True):
                parameter.copy_(weight - gradient * (length * start / max(squared, 1e-30)))
            after = float(_loss(wrapped, images, coalitions))
            if after < start:
                break
    return start, after
