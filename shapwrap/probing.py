"""Images of noise on which claims about a model are tested, without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Backbone
from shapwrap.errors import ImageError, ShapwrapError, UnsupportedBackboneError
from shapwrap.masking.batch_norm import evaluation_mode

FAILURES = (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a model raises when its parts are run in a way that they were not made for."""


@contextmanager
def in_full_precision(*modules: nn.Module, double: bool = False) -> Iterator[None]:
    """Half-precision weights are float32 inside, where rounding cannot hide a wrong claim.

    With `double`, all weights are float64. Going to a higher precision and back loses nothing;
    objects and gradients stay.
    """
    lower = [torch.float16, torch.bfloat16, *([torch.float32] if double else [])]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    halves = [(t, t.dtype) for t in tensors if t.dtype in lower]
    for tensor, _ in halves:
        tensor.data = tensor.data.double() if double else tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
        known = {id(tensor) for tensor in tensors}
        made = [b for module in modules for b in module.buffers() if id(b) not in known]
        for buffer in made if halves else []:
            # A model may fill buffers as it runs, in the precision that its weights had inside.
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(halves[0][1])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, everything as it was outside."""
    # Some models draw random numbers in eval mode too.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluation_mode(model.modules()):
        yield


def check_image_size(backbone: Backbone, images: Images) -> Grid:
    """The patch grid of such images; raises an error of ours where the model raises its own.

    Raises:
        ImageError: The backbone refuses this size.
        UnsupportedBackboneError: The model takes it, but not this adapter's parts.
    """
    try:
        return backbone.features(images).grid
    except FAILURES as error:
        if isinstance(error, ShapwrapError):
            raise
        height, width = backbone.image_size()
        if runs(backbone.model, images):
            raise UnsupportedBackboneError(
                f"the parts of {type(backbone.model).__name__} ({backbone.family}) cannot be run "
                f"as the model runs them ({type(error).__name__}: {error}); its forward pass does "
                "more than these parts in their order."
            ) from error
        raise ImageError(
            f"{type(backbone.model).__name__} refuses images of {images.shape[-2]} x "
            f"{images.shape[-1]} pixels ({error}); it was built for {height} x {width}. "
            "Resize the images, or build the model for this size and wrap it with image_size=."
        ) from error


def runs(model: nn.Module, images: Images) -> bool:
    """Whether the model takes such images."""
    try:
        model(images)
    except FAILURES:
        return False
    return True


def random_images(backbone: Backbone, size: tuple[int, int], batch: int) -> Images:
    """Reproducible noise, as normalised images; leaves the global random state alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, backbone.in_channels(size), *size, generator=generator)
    return images.to(backbone.parameter)
