"""What the compared methods need to know about a model: its logits, its patches, its parts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images, Logits
from shapwrap.backbones.base import Backbone, Normalization
from shapwrap.choosing import Request
from shapwrap.clip.zero_shot import ZeroShotClassifier
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    ReadoutError,
    ShapwrapError,
    UnsupportedBackboneError,
)
from shapwrap.images import check_finite, check_images, first_weight
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.probing import in_full_precision, undisturbed
from shapwrap.wrapper import ShapleyWrapper
from shapwrap.wrapping import wrap

Model = nn.Module | Callable[[Tensor], Tensor]
"""Normalised images [B, C, H, W] to logits [B, K]."""


class ExplainedModel:
    """A model, wrapped or plain, or any function from images to logits.

    The parts of a module are found by the wrapper's own introspection, on first use; the model is
    not changed by it. Of a compiled module, or of one for several devices (DataParallel,
    DistributedDataParallel), the module inside is explained: recorded are functions as they run,
    which compiled code does not call. Of a `ZeroShotClassifier`, the parts are those of its image
    tower.

    Args:
        model: A module, a wrapped model or a function.
        grid: Rows and columns of patches that values are given for; by default those of the
            backbone. A function needs it.

    Raises:
        BackboneTypeError: Neither a module nor a function.
        ArgumentError: A grid that is not two positive ints.
    """

    def __init__(self, model: Model, *, grid: Grid | None = None):
        if isinstance(model, type) or not callable(model):
            raise BackboneTypeError(
                f"model is {model!r}; expected an nn.Module, a ShapleyWrapper or a function from "
                "images to logits."
            )
        if grid is not None and not (
            len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
        ):
            raise ArgumentError(f"grid is {grid!r}; expected two positive ints, rows first.")
        self.model = _inside(model)
        self._grid = grid
        self._native: dict[tuple[int, int], Grid] = {}

    def logits(self, images: Images) -> Logits:
        """f(x), [B, K], in the model's own precision; gradients flow.

        Raises:
            UnsupportedBackboneError: The model returns something else.
        """
        logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedBackboneError(
                f"the model gives {came} for {len(images)} images; expected logits [B, K]."
            )
        return logits

    @property
    def wrapped(self) -> ShapleyWrapper | None:
        """The wrapped model, if it is one."""
        return self.model if isinstance(self.model, ShapleyWrapper) else None

    @property
    def zero_shot(self) -> ZeroShotClassifier | None:
        """The image-text model with its texts, if it is one."""
        return self.model if isinstance(self.model, ZeroShotClassifier) else None

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, where the model tells."""
        known = self.wrapped or self.zero_shot
        return None if known is None else known.class_names

    @property
    def module(self) -> nn.Module | None:
        """The model as a module, if it is one."""
        return self.model if isinstance(self.model, nn.Module) else None

    @cached_property
    def backbone(self) -> Backbone:
        """The adapter that knows the model's parts.

        Raises:
            UnsupportedBackboneError: The model is a function.
            ShapwrapError: No adapter fits.
        """
        if self.wrapped is not None:
            return self.wrapped._wrapping.backbone
        if self.module is None:
            raise UnsupportedBackboneError(
                "the model is a function, whose parts cannot be found; expected an nn.Module."
            )
        device = next((p.device.type for p in self.module.parameters()), "cpu")
        # What is claimed of the parts is proved in full precision.
        with torch.autocast(device, enabled=False):
            if self.zero_shot is not None:
                return _backbone_of_tower(self.zero_shot.tower)
            return wrap(self.module, Request(), None)[0].backbone

    def grid_of(self, images: Images) -> Grid:
        """Rows and columns of patches for images of this size.

        Raises:
            ArgumentError: They are not known, and no `grid` was given.
        """
        return self._grid or self.native_grid(images)

    def native_grid(self, images: Images) -> Grid:
        """Rows and columns of the backbone's own patches, whatever `grid` was given.

        Raises:
            ArgumentError: They are not known.
        """
        if self.wrapped is not None:
            return self.wrapped.grid_of(images)
        size = (images.shape[-2], images.shape[-1])
        if size not in self._native:
            try:
                backbone = self.backbone
            except ShapwrapError as error:
                raise ArgumentError(
                    f"the patch grid of this model is not known ({error}); pass grid=(rows, "
                    "columns)."
                ) from error
            with undisturbed(backbone.model), in_full_precision(backbone.model):
                grid = backbone.features(images[:1].to(backbone.parameter)).grid
            self._native[size] = grid
        return self._native[size]

    def covered(self, images: Images) -> tuple[int, int] | None:
        """Height and width over which the patches lie, where a backbone tells."""
        if self._grid is not None or self.module is None:
            return None
        size = (images.shape[-2], images.shape[-1])
        return self.backbone.covered(size, self.grid_of(images))

    @cached_property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation of the channels, as the model tells or its adapter knows."""
        if self.wrapped is not None:
            return self.wrapped.normalization
        configuration = getattr(self.model, "pretrained_cfg", None) or {}
        if "mean" in configuration and "std" in configuration:
            return Normalization(tuple(configuration["mean"]), tuple(configuration["std"]))
        try:
            return self.backbone.normalization()
        except ShapwrapError:
            return None

    def check(self, images: Tensor) -> None:
        """Raise unless the images can be explained.

        Raises:
            ImageTypeError: Not a floating-point tensor.
            ImageError: Wrong shape or device, or pixels that are not finite.
        """
        reads = self.module if self.zero_shot is None else self.zero_shot.tower
        weight = None if reads is None else first_weight(reads)
        channels = images.shape[1] if isinstance(images, Tensor) and images.ndim == 4 else 0
        check_images(images, channels, images if weight is None else weight)
        check_finite(images)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Eval mode inside, every module's own mode outside."""
        modules = [] if self.module is None else list(self.module.modules())
        with evaluation_mode(modules), torch.inference_mode(False):
            yield


def _backbone_of_tower(tower: nn.Module) -> Backbone:
    """The adapter of an image tower: one that knows its patches, where there is one."""
    embedding = nn.Identity()
    try:
        return wrap(tower, Request(head=embedding, readout="cosine"), None)[0].backbone
    except (ReadoutError, UnsupportedBackboneError):
        # Its patches have no embedding of their own; the grid is known all the same.
        return wrap(tower, Request(head=embedding), None)[0].backbone


def _inside(model: Model) -> Model:
    """The module that a compiled or a parallel one holds."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model
