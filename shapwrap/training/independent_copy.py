"""A wrapped model that may be trained without a trace in the one it was copied from."""

import copy

import torch

from shapwrap.errors import ArgumentError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.probing import random_images
from shapwrap.wrapper import ShapleyWrapper


def independent_copy(wrapped: ShapleyWrapper) -> ShapleyWrapper:
    """A copy that shares no weight with the original.

    Raises:
        ArgumentError: The model cannot be copied, or a function in it holds parts of the original.
    """
    name = type(wrapped.model).__name__
    try:
        copied = copy.deepcopy(wrapped)
    except Exception as error:  # a model of any library raises what it likes
        raise ArgumentError(
            "shapley_weight is 'auto', which trains a copy of the model first, but "
            f"copy.deepcopy fails on {name} ({type(error).__name__}: {error}). Leave out what "
            "cannot be copied, such as tensors that were computed from others (old-style "
            "weight_norm; torch.nn.utils.parametrizations has a new one), or give a number."
        ) from error
    if _reads(copied, wrapped):
        raise ArgumentError(
            f"shapley_weight is 'auto', which trains a copy of the model first, but the copy of "
            f"{name} calls the original's layers: features=, head=, a hook or a replaced forward "
            "is a function that holds them. Name submodules instead, or give a number."
        )
    return copied


def _reads(copied: ShapleyWrapper, original: ShapleyWrapper) -> bool:
    """Whether weights of the original that can learn are in the copy's logits."""
    weights = [parameter for parameter in original.parameters() if parameter.requires_grad]
    wrapping = copied._wrapping
    images = random_images(wrapping.backbone, wrapping.image_size, batch=1)
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        evaluation_mode((*copied.modules(), *original.modules())),
    ):
        logits = copied(images)
        if not weights or not logits.requires_grad:
            return False
        gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    return any(gradient is not None for gradient in gradients)
