"""What happens once, when a model is wrapped: parts are found, and claims are proved by numbers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.densify import densify
from shapwrap.backbones.registry import candidates
from shapwrap.backbones.removal_test import check_removal, check_replay
from shapwrap.backbones.stride_one import StrideChange
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import (
    ArgumentError,
    ImageError,
    MaskingError,
    ReadoutError,
    ShapwrapError,
    UnsupportedBackboneError,
)
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.readout.head import Head, new_head
from shapwrap.values.game import logits_of

Masking = Literal["token-removal", "zero-mask"]

logger = logging.getLogger("shapwrap")


@dataclass
class Wrapping:
    """What was found out about a model."""

    backbone: Backbone
    head: Head
    masking: Masking
    grid: Grid
    image_size: tuple[int, int]
    max_logit_difference: float
    logit_scale: float
    class_token_dropped: bool
    registers_dropped: bool = False
    stride_changes: list[StrideChange] = field(default_factory=list)
    why_not_removal: str = ""


@contextmanager
def in_full_precision(*modules: nn.Module) -> Iterator[None]:
    """Half-precision weights are float32 inside, where rounding cannot hide a wrong claim.

    Going from half precision to float32 and back loses nothing; objects and gradients stay.
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    halves = [(t, t.dtype) for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, everything as it was outside."""
    with torch.no_grad(), evaluation_mode(model.modules()):
        yield


def wrap(
    model: nn.Module,
    *,
    masking: str,
    readout: str,
    grid: Grid | None,
    head: nn.Module | None,
    num_classes: int | None,
    prefix_tokens: str,
    image_size: tuple[int, int] | None,
) -> tuple[Wrapping, nn.Module | None]:
    """Finds adapter, masking, readout and grid for a model; also returns a newly made head.

    Raises:
        ShapwrapError: A subclass that says what cannot be done and what to do.
    """
    if masking != "auto" and masking not in get_args(Masking):
        raise ArgumentError(
            f"masking is {masking!r}; expected 'auto' or one of {get_args(Masking)}."
        )
    if head is not None and num_classes is not None:
        raise ArgumentError("head and num_classes were both given; expected one of them.")
    _check_statistics(model)
    weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    dtype = weights.dtype
    given = [model] if head is None else [model, head]
    with (
        undisturbed(model),
        evaluation_mode(head.modules() if head is not None else ()),
        in_full_precision(*given),
    ):
        backbone, images, why_not = _choose_backbone(model, masking, prefix_tokens, image_size)
        reads_patches = not backbone.ignores_patches(images)
        feature_map = backbone.features(images)
        like = feature_map.features.mean(dim=1)
        if num_classes is not None:
            head = new_head(backbone, backbone.pre_logits(like).shape[1], num_classes)
        parts = _make_head(backbone, head, like, readout)
        hidden, output = backbone.original(images)
        if head is not None:
            hidden = parts.pre_logits.after_model(hidden)
            output = parts.classifier(hidden)
        original = output
        if reads_patches:
            complete = _original_features(backbone, images)
            pooled = parts.readout.pooled(complete.mean(dim=1))
            _check_pooling(backbone, "the input of its classifier", hidden, pooled)
            logits = logits_of(parts, complete, training=False)
            _check_pooling(backbone, "its logits", original, logits)
        difference = _difference(parts, backbone, images, original)
        changes: list[StrideChange] = []
        if grid is not None and tuple(grid) != feature_map.grid:
            changes = densify(backbone, images, (int(grid[0]), int(grid[1])))
            difference = _difference(parts, backbone, images, original)
        chosen: Masking = "zero-mask"
        if isinstance(backbone, TokenBackbone) and masking != "zero-mask" and not why_not:
            chosen = "token-removal"
        wrapping = Wrapping(
            backbone=backbone,
            head=parts,
            masking=chosen,
            grid=backbone.features(images).grid,
            image_size=(images.shape[-2], images.shape[-1]),
            max_logit_difference=difference,
            logit_scale=float(original.abs().max()),
            class_token_dropped=not reads_patches,
            registers_dropped=reads_patches and bool(backbone.unused_parameters()),
            stride_changes=changes,
            why_not_removal=why_not,
        )
    if head is None or num_classes is None:
        return wrapping, None
    return wrapping, head.to(dtype)


def _make_head(backbone: Backbone, head: nn.Module | None, like: Tensor, readout: str) -> Head:
    try:
        parts = Head(backbone, head, like, readout)
        parts.classifier(parts.readout.pooled(like))
        return parts
    except RuntimeError as error:
        if head is None or isinstance(error, ShapwrapError):
            raise
        width = backbone.pre_logits(like).shape[1]
        raise ReadoutError(
            f"head does not take the {width} features that the classifier of "
            f"{type(backbone.model).__name__} reads ({error}); expected nn.Linear({width}, "
            "classes), or nn.Sequential that begins with such a layer."
        ) from error


def _check_statistics(model: nn.Module) -> None:
    """Without running statistics, one image's logits depend on the rest of its batch."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise UnsupportedBackboneError(
                f"{name} of {type(model).__name__} is batch normalisation without running "
                "statistics: the value of a coalition would depend on the other images of its "
                "batch. Build it with track_running_stats=True."
            )


def _choose_backbone(
    model: nn.Module, masking: str, prefix_tokens: str, image_size: tuple[int, int] | None
) -> tuple[Backbone, Images, str]:
    """First adapter that passes its tests, random images for it, and why removal was ruled out."""
    found = candidates(model)
    why_not = ""
    for backbone in found:
        images = random_images(backbone, image_size or backbone.image_size(), batch=2)
        if not isinstance(backbone, TokenBackbone):
            break
        try:
            reads_patches = not backbone.ignores_patches(images)
            backbone.choose_prefix(prefix_tokens, head_reads_patches=reads_patches)
            check_removal(backbone, images)
            return backbone, images, ""
        except MaskingError as error:
            if masking == "token-removal":
                raise
            why_not = str(error)
            logger.info("%s falls back to zero-masking: %s", type(model).__name__, error)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, ShapwrapError):
                raise
            why_not = f"its parts cannot be run on their own ({type(error).__name__}: {error})"
    else:
        # No other adapter fits: pixels can still be zeroed, if the parts are the whole model.
        backbone = found[-1]
        images = random_images(backbone, image_size or backbone.image_size(), batch=2)
        check_image_size(backbone, images)
        if isinstance(backbone, TokenBackbone):
            check_replay(backbone, images)
    if masking == "token-removal":
        raise MaskingError(
            f"masking='token-removal' was asked for, but {type(model).__name__} "
            f"({backbone.family}) mixes patches before any token could be removed"
            f"{': ' + why_not if why_not else ''}. Use masking='zero-mask'."
        )
    check_image_size(backbone, images)
    return backbone, images, why_not


def check_image_size(backbone: Backbone, images: Images) -> Grid:
    """The patch grid of such images; raises an error of ours where the model raises its own.

    Raises:
        ImageError: The backbone refuses this size.
    """
    try:
        return backbone.features(images).grid
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, ShapwrapError):
            raise
        height, width = backbone.image_size()
        if tuple(images.shape[-2:]) == (height, width) and _runs(backbone.model, images):
            raise UnsupportedBackboneError(
                f"the parts of {type(backbone.model).__name__} ({backbone.family}) cannot be run "
                f"on images of its own size, {height} x {width} ({type(error).__name__}: {error}); "
                "its forward pass does more than these parts in their order."
            ) from error
        raise ImageError(
            f"{type(backbone.model).__name__} refuses images of {images.shape[-2]} x "
            f"{images.shape[-1]} pixels ({error}); it was built for {height} x {width}. "
            "Resize the images, or build the model for this size and wrap it with image_size=."
        ) from error


def _runs(model: nn.Module, images: Images) -> bool:
    try:
        model(images)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def random_images(backbone: Backbone, size: tuple[int, int], batch: int) -> Images:
    """Reproducible noise, as normalised images; leaves the global random state alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, backbone.in_channels(), *size, generator=generator)
    return images.to(backbone.parameter)


def _difference(head: Head, backbone: Backbone, images: Images, original: Tensor) -> float:
    logits = logits_of(head, backbone.features(images).features, training=False)
    return float((logits - original).abs().max())


def _original_features(backbone: Backbone, images: Images) -> Tensor:
    """Patch features as the model itself computes them."""
    if isinstance(backbone, TokenBackbone):
        num_patches = backbone.embed(images).patches.shape[1]
        return backbone.original_tokens(images)[:, -num_patches:]
    return backbone.features(images).features


def _check_pooling(backbone: Backbone, what: str, original: Tensor, replayed: Tensor) -> None:
    """A head that reads patches must read their mean, or no patch value would be honest."""
    tolerance = 1e-3
    same_shape = original.shape == replayed.shape
    error = float((original - replayed).abs().max()) if same_shape else float("inf")
    if not error <= tolerance * float(original.abs().max()):
        raise UnsupportedBackboneError(
            f"{type(backbone.model).__name__} ({backbone.family}) does not read the mean of its "
            f"patches, or does more than its parts in their order: running the parts and reading "
            f"the mean changes {what} by {error:.2g}. Build the model with average pooling "
            "(timm: global_pool='avg'), or, for a token model, with a class token."
        )
