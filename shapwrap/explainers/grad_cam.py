"""Grad-CAM on convolutional models and on the tokens of transformers, without choosing a layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Grid, Images, PatchFeatures
from shapwrap.backbones.base import FeatureMap
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.cam_layers import Site, feature_map, last_block_tokens, patches_in
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import in_full
from shapwrap.masking.batch_norm import without_recomputation
from shapwrap.probing import in_full_precision

VARIANTS = ("auto", "cnn", "tokens")


class GradCAM(Explainer):
    """ReLU of sum_d w_d F_d, where w_d is the mean over patches of d f_c / d F_d.

    F is the map that the pretrained pooling reads ("cnn": `layer4[-1]` of a ResNet, whatever the
    layout), or the patch tokens after the first norm of the last block ("tokens"). After that
    norm, the patches of a class-token model influence nothing and their gradient is zero.

    Args:
        model: A module or a wrapped model; a function only with a module as `layer`, and `grid`.
        grid: Rows and columns of patches; by default those of the backbone. A map of another grid
            is resized to it, bilinearly.
        chunk_size: Images that go through the model at a time.
        variant: "cnn", "tokens", or "auto": "tokens" where the wrapper removes tokens.
        layer: A module of the model, or its name, to look at instead; its output is a map
            [B, D, h, w] or [B, h, w, D], or tokens with patches last.
        relu: Whether to set negative values to zero; without, values are signed.

    Raises:
        ArgumentError: An option outside its range, or a layer that the model does not have.
        BackboneTypeError: Neither a module nor a function.
        ShapwrapError: No adapter fits the model, and no layer was given.

    References:
        Selvaraju et al. 2017, "Grad-CAM". On tokens: as in the package `grad-cam`.
    """

    name = "grad-cam"

    def __init__(
        self,
        model: Model,
        *,
        grid: Grid | None = None,
        chunk_size: int = 64,
        variant: str = "auto",
        layer: nn.Module | str | None = None,
        relu: bool = True,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        if variant not in VARIANTS:
            raise ArgumentError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}.")
        if layer is not None and variant != "auto":
            raise ArgumentError(
                f"variant is {variant!r} and layer was given; expected one of the two, since a "
                "variant is a choice of layer."
            )
        self.relu = relu
        self._given = None if layer is None else Site(self._layer_named(layer))
        self._found: Site | None = None
        self._tried = [variant]
        if variant == "auto" and self._given is None:
            self._tried = ["cnn", "tokens"]
            if isinstance(self.model.backbone, TokenBackbone):
                self._tried.reverse()
        self._be("layer" if self._given else self._tried[0])

    def _be(self, variant: str) -> None:
        self.variant = variant
        self.name = "grad-cam (tokens)" if variant == "tokens" else "grad-cam"

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """Values of patches; one forward and one backward an image."""
        site = self._given or self._site((images.shape[-2], images.shape[-1]))
        maps, grids = [], []
        for part, classes in zip(
            images.split(self.chunk_size), target.split(self.chunk_size), strict=True
        ):
            channels, gradients, grid = self._at(site, part, classes)
            maps.append(class_activation_map(channels, gradients, relu=self.relu))
            grids.append(grid)
        wanted = self.model.grid_of(images)
        return Attribution(resized(torch.cat(maps), grids[0], wanted), wanted)

    def _at(
        self, site: Site, images: Images, target: Int[Tensor, " batch"]
    ) -> tuple[PatchFeatures, PatchFeatures, Grid]:
        """Features of patches, the gradient of f_c with respect to them, and their grid."""
        module = self.model.module
        with (
            torch.enable_grad(),
            nullcontext() if module is None else without_recomputation(module),
            _passing(site) as passed,
        ):
            # Not a leaf: the model may change its input in place.
            logits = self.model.logits(images.detach().requires_grad_().clone())
            value = _only(passed, site.module)
            score = logits.gather(1, target[:, None]).sum()
            gradient = _gradient(score, value)
        size = (images.shape[-2], images.shape[-1])
        channels = self._patches(value.detach(), images, size)
        gradients = self._patches(gradient, images, size)
        if not gradients.features.any():
            warnings.warn(
                f"the logits do not depend on the patches at {type(site.module).__name__}, so the "
                "map is zero: a classifier of zeros, or a layer after the last attention of a "
                "head that reads the class token alone, for which use variant='tokens'.",
                stacklevel=4,
            )
        return channels.features, gradients.features, channels.grid

    def _patches(self, value: Tensor, images: Images, size: tuple[int, int]) -> FeatureMap:
        native = self.model.native_grid(images) if value.ndim == 3 else (1, 1)
        # A wrapper passes the attributes of its model on, its layout too.
        found = patches_in(value, native, size, self.model.module)
        if found is None:
            raise UnsupportedBackboneError(
                f"the layer gives {tuple(value.shape)} for images of {size[0]} x {size[1]} pixels; "
                "expected a map [B, D, h, w] or [B, h, w, D] of their aspect ratio, or tokens "
                f"[B, T, D] whose last {native[0] * native[1]} are the patches."
            )
        return found

    def _site(self, size: tuple[int, int]) -> Site:
        """The layer that introspection finds, once."""
        if self._found is not None:
            return self._found
        module = self.model.backbone.model
        with (
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            in_full_precision(module),
            torch.autocast(next(module.parameters()).device.type, enabled=False),
            without_recomputation(module),
        ):
            for variant in self._tried:
                find = last_block_tokens if variant == "tokens" else feature_map
                self._found = find(self.model, size)
                if self._found is not None:
                    self._be(variant)
                    return self._found
        what = {"cnn": "map that its head reads", "tokens": "last block of tokens"}
        raise UnsupportedBackboneError(
            f"no layer of {type(module).__name__} shows the "
            f"{', or the '.join(what[variant] for variant in self._tried)}; pass layer= (a module "
            "or its name), or another variant."
        )

    def _layer_named(self, layer: nn.Module | str) -> nn.Module:
        module = self.model.wrapped.model if self.model.wrapped else self.model.module
        if isinstance(layer, nn.Module):
            if module is not None and all(layer is not m for m in module.modules()):
                raise ArgumentError(
                    f"layer is a {type(layer).__name__} that is no module of the model; expected "
                    "one of model.modules(), or a name from model.named_modules()."
                )
            return layer
        try:
            return module.get_submodule(layer)  # pyright: ignore[reportOptionalMemberAccess]
        except AttributeError as error:
            raise ArgumentError(
                f"layer is {layer!r}, which the model does not have; expected a module, or a name "
                "from model.named_modules()."
            ) from error


def class_activation_map(
    channels: Float[Tensor, "batch patches channels"],
    gradients: Float[Tensor, "batch patches channels"],
    *,
    relu: bool = True,
) -> Float[Tensor, "batch patches"]:
    """Channels weighted by their mean gradient, summed; full precision.

    Args:
        channels: Features of each patch; attention to each patch, with heads as channels.
        gradients: Of f_c with respect to them.
        relu: Whether to set negative values to zero.
    """
    weights = in_full(gradients).mean(dim=1, keepdim=True)
    values = (weights * in_full(channels)).sum(dim=2)
    return values.relu() if relu else values


def resized(
    values: Float[Tensor, "batch patches"], grid: Grid, wanted: Grid
) -> Float[Tensor, "batch wanted"]:
    """Values on another grid: bilinear, averaged where it is coarser."""
    if grid == wanted:
        return values
    maps = values.unflatten(1, grid)[:, None]
    return functional.interpolate(
        maps, size=wanted, mode="bilinear", align_corners=False, antialias=True
    ).flatten(1)


@contextmanager
def _passing(site: Site) -> Iterator[list[Any]]:
    """Collects what goes into a layer, or comes out of it; the hook is gone afterwards."""
    passed: list[Any] = []
    if site.side == "input":
        handle = site.module.register_forward_pre_hook(lambda _, given: passed.append(given[0]))
    else:
        handle = site.module.register_forward_hook(lambda *given: passed.append(given[2]))
    try:
        yield passed
    finally:
        handle.remove()


def _only(passed: list[Any], module: nn.Module) -> Tensor:
    if len(passed) == 1 and isinstance(passed[0], Tensor) and passed[0].requires_grad:
        return passed[0]
    came = f"ran {len(passed)} times" if len(passed) != 1 else f"gave a {type(passed[0]).__name__}"
    raise UnsupportedBackboneError(
        f"{type(module).__name__} {came} in one forward pass; expected a layer that runs once and "
        "gives one tensor that depends on the image. Pass another layer= (a module or its name)."
    )


def _gradient(score: Tensor, value: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(score, value, allow_unused=True)
    return torch.zeros_like(value) if gradient is None else gradient
