"""Where Grad-CAM looks: the map that the head reads, or the tokens that the last block norms.

Both are found by running the model once on noise and following gradients through it; names of
layers play no role.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shapwrap._types import Grid, PatchFeatures
from shapwrap.backbones.base import Backbone, FeatureMap
from shapwrap.backbones.layout import is_channels_last, patches_of_map
from shapwrap.backbones.places import MOST_EXTRA_TOKENS, places_in
from shapwrap.backbones.recording import Recording, recording
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.backbones.whole_model import WholeModel
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.probing import random_images


class Site(NamedTuple):
    """A layer, and which of its two sides is meant."""

    module: nn.Module
    side: Literal["input", "output"] = "output"


class _Run(NamedTuple):
    """One forward pass on noise, with its graph."""

    record: Recording
    once: Sequence[nn.Module]
    """Modules that ran once, in the order in which they ended."""
    output: Tensor | None
    """Logits, where the model was run as a classifier."""
    grid: Grid


def patches_in(
    value: Tensor, native: Grid, size: tuple[int, int], like: nn.Module | None = None
) -> FeatureMap | None:
    """What a layer says of each patch; None if it is neither a map nor tokens of patches.

    Args:
        value: [B, D, h, w], [B, h, w, D], or [B, T, D] with patches after all other tokens.
        native: The grid of tokens.
        size: Height and width of the images, whose aspect ratio a map has.
        like: The model, which may state its layout; asked where the shape leaves it open.
    """
    if value.ndim == 3:
        extra = value.shape[1] - native[0] * native[1]
        in_place = 0 <= extra <= MOST_EXTRA_TOKENS
        return FeatureMap(value[:, extra:], native) if in_place else None
    if value.ndim != 4:
        return None
    first, last = (_has_aspect(value.shape[axis : axis + 2], size) for axis in (2, 1))
    if not first and not last:
        return None
    channels_last = last and (not first or (like is not None and is_channels_last(like, value)))
    return patches_of_map(value, channels_last=channels_last)


def feature_map(model: ExplainedModel, size: tuple[int, int]) -> Site | None:
    """The layer whose output is the feature map of the wrapper, if the logits depend on it.

    Where the head weighs patches first, the last layer that makes a map of that grid.
    """
    backbone = model.backbone
    noise = random_images(backbone, size, batch=2)
    with torch.no_grad():
        features, grid = backbone.features(noise)
    if isinstance(backbone, WholeModel):
        features = features[..., : backbone.own_width(features)]
    run = _run(model, backbone, size, grid)
    exact = [Site(m) for m in run.once if _is_same(run.record.outputs[m], features)]
    found = _last_alive(run, exact, size)
    if found is None and not isinstance(backbone, TokenBackbone):
        places = [place.module for place in places_in(run.record, size)]
        # Among the layers within a block of tokens, the last one would be an accident.
        maps = [Site(module) for module in places if run.record.outputs[module].ndim == 4]
        found = _last_alive(run, maps if len(maps) == len(places) else [], size)
    return found


def last_block_tokens(model: ExplainedModel, size: tuple[int, int]) -> Site | None:
    """What enters the attention of the last block: the output of its first norm.

    Later patches of a class-token model influence nothing, so their gradient is zero. A block
    without a norm before its attention is looked at from outside.
    """
    backbone = model.backbone
    noise = random_images(backbone, size, batch=1)
    grid = backbone.features(noise).grid
    prefixes = None
    if isinstance(backbone, TokenBackbone):
        prefixes = {backbone.embed(noise).prefix.shape[1]}
    # Some adapters replay the layers within a block, so it is found in the model's own pass.
    run = _run(None, backbone, size, grid)
    block = _innermost_block(run, backbone.model, prefixes)
    if block is None:
        return None
    tokens = run.record.inputs[block]
    first = next(module for module in run.once if module in set(block.modules()))
    parameters = list(first.parameters())
    is_norm = bool(parameters) and all(parameter.ndim < 2 for parameter in parameters)
    if is_norm and _shape(run.record.outputs[first]) == tokens.shape:
        return Site(first)
    # Where an adapter replays the block, its first layer runs all the same.
    same = run.record.inputs.get(first) is tokens
    return Site(first if same else block, "input")


def _run(
    model: ExplainedModel | None, backbone: Backbone, size: tuple[int, int], grid: Grid
) -> _Run:
    noise = random_images(backbone, size, batch=2)
    with torch.enable_grad(), recording(list(backbone.model.modules())) as record:
        # Not a leaf: the model may change its input in place.
        noise = noise.requires_grad_().clone()
        output = backbone.model(noise) if model is None else model.logits(noise)
    once = [module for module, times in Counter(record.order).items() if times == 1]
    return _Run(record, once, output if model is not None else None, grid)


def _last_alive(run: _Run, sites: Sequence[Site], size: tuple[int, int]) -> Site | None:
    """The last of these layers whose patches influence the logits; the last one if none does.

    None does where a new classifier is still zero.
    """
    values = [run.record.outputs[site.module] for site in sites]
    grids = {id(value): patches_in(value, run.grid, size) for value in values}
    pairs = [
        (site, value)
        for site, value in zip(sites, values, strict=True)
        if value.requires_grad and (found := grids[id(value)]) and found.grid == run.grid
    ]
    if not pairs or run.output is None:
        return None
    gradients = torch.autograd.grad(
        _anyhow(run.output), [value for _, value in pairs], allow_unused=True, retain_graph=True
    )
    for (site, _), gradient in zip(reversed(pairs), reversed(gradients), strict=True):
        if gradient is not None:
            found = patches_in(gradient, run.grid, size)
            if found is not None and bool(found.features.any()):
                return site
    dead = all(gradient is None or not gradient.any() for gradient in gradients)
    return pairs[-1][0] if dead else None


def _innermost_block(run: _Run, model: nn.Module, prefixes: set[int] | None) -> nn.Module | None:
    """The last element of a list of layers that turns tokens into as many, and mixes them."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    elements = {element for one in lists for element in one.children()}
    patches = run.grid[0] * run.grid[1]
    within, found = set(model.modules()), None
    while True:
        blocks = [m for m in run.once if m in elements & within and m is not found]
        blocks = [m for m in blocks if _keeps_tokens(run.record, m, patches, prefixes)]
        inner = next((m for m in reversed(blocks) if _mixes(run.record, m)), None)
        if inner is None:
            return found
        found, within = inner, set(inner.modules())


def _keeps_tokens(
    record: Recording, module: nn.Module, patches: int, prefixes: set[int] | None
) -> bool:
    tokens = record.inputs.get(module)
    if tokens is None or tokens.ndim != 3 or _shape(record.outputs[module]) != tokens.shape:
        return False
    extra = tokens.shape[1] - patches
    return extra in prefixes if prefixes is not None else 0 <= extra <= MOST_EXTRA_TOKENS


def _mixes(record: Recording, module: nn.Module) -> bool:
    """Whether what comes out as the last token depends on the tokens before."""
    given, made = record.inputs[module], record.outputs[module]
    if not given.requires_grad or not made.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(
        _anyhow(made[:, -1]), given, allow_unused=True, retain_graph=True
    )
    return gradient is not None and bool(gradient[:, :-1].any())


def _anyhow(output: Tensor) -> Tensor:
    """A number that depends on all of the output; a plain sum is constant after a norm."""
    generator = torch.Generator().manual_seed(0)
    return (output * torch.randn(output.shape, generator=generator).to(output)).sum()


def _is_same(value: object, features: PatchFeatures) -> bool:
    """Whether an output holds these features, in any layout."""
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return False
    if value.ndim == 3:
        layouts = [value[:, value.shape[1] - features.shape[1] :]]
    else:
        layouts = [value.flatten(2).transpose(1, 2), value.flatten(1, 2)]
    return any(
        layout.shape == features.shape and torch.allclose(layout, features, rtol=1e-4, atol=1e-5)
        for layout in layouts
    )


def _shape(value: object) -> object:
    return value.shape if isinstance(value, Tensor) else None


def _has_aspect(sides: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether a map of such sides covers the image; borders may cost a row or a column."""
    return abs(sides[0] * size[1] - sides[1] * size[0]) <= max(size)
