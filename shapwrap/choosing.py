"""Which adapter is used for a model: the first whose claims hold on images of noise."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Images
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.classifiers import comes_last
from shapwrap.backbones.given_parts import given_parts
from shapwrap.backbones.registry import candidates
from shapwrap.backbones.removal_test import check_removal, check_replay
from shapwrap.backbones.timm_family import TimmFamily
from shapwrap.backbones.tokens import PrefixTokens, TokenBackbone
from shapwrap.backbones.tower_whole import TowerWhole
from shapwrap.backbones.whole_model import WholeModel
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    ImageError,
    MaskingError,
    ReadoutError,
    ShapwrapError,
    UnsupportedBackboneError,
)
from shapwrap.probing import FAILURES, check_image_size, random_images, runs
from shapwrap.readout.class_token import ClassTokenReadout
from shapwrap.readout.head import Head, new_head
from shapwrap.readout.readouts import CosineReadout, ReadoutName
from shapwrap.values.game import logits_of

Masking = Literal["token-removal", "zero-mask"]
Part = str | Callable[..., Tensor]

logger = logging.getLogger("shapwrap")


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `ShapleyWrapper`."""

    masking: str = "auto"
    readout: str = "auto"
    features: Part | None = None
    head: nn.Module | Part | None = None
    num_classes: int | None = None
    prefix_tokens: str = "auto"
    image_size: tuple[int, int] | None = None


@dataclass
class Choice:
    """An adapter that passed, and what was learned on the way."""

    backbone: Backbone
    head: Head
    new_head: nn.Module | None
    masking: Masking
    images: Images
    original: Tensor
    logit_difference: float
    reads_patches: bool
    why_not_removal: str


def check_request(request: Request) -> None:
    """Raise unless the options exist and go together.

    Raises:
        ArgumentError: They do not.
        ReadoutError: An unknown readout.
    """
    masking = request.masking
    if masking != "auto" and masking not in get_args(Masking):
        raise ArgumentError(
            f"masking is {masking!r}; expected 'auto' or one of {get_args(Masking)}."
        )
    if request.readout != "auto" and request.readout not in get_args(ReadoutName):
        raise ReadoutError(
            f"readout is {request.readout!r}; expected 'auto' or one of {get_args(ReadoutName)}."
        )
    if request.prefix_tokens not in ("auto", *get_args(PrefixTokens)):
        raise ArgumentError(
            f"prefix_tokens is {request.prefix_tokens!r}; expected 'auto', 'drop' or 'keep'."
        )
    if request.head is not None and request.num_classes is not None:
        raise ArgumentError("head and num_classes were both given; expected one of them.")


def choose(model: nn.Module, request: Request) -> Choice:
    """The first adapter that reproduces the model, and whose masking is proved.

    Raises:
        ShapwrapError: None does; the reasons of those that came close.
    """
    found = _adapters(model, request)
    rejected: list[ShapwrapError] = []
    size = request.image_size or found[0].image_size()
    why_not = ""
    for backbone in found:
        images = random_images(backbone, size, batch=2)
        kept = _with_class_token(backbone, images, request)
        if kept is not None:
            return kept
        try:
            try:
                masking = _masking(backbone, images, request)
            except MaskingError as error:
                if request.masking == "token-removal":
                    raise
                why_not = str(error)
                logger.info("%s falls back to zero-masking: %s", type(model).__name__, error)
                if isinstance(backbone, TokenBackbone):
                    check_replay(backbone, images)
                masking: Masking = "zero-mask"
            if not why_not and isinstance(backbone, TokenBackbone):
                keeper = None
            else:
                keeper = next((b for b in found if _keeps_head(b)), None)
            choice = _attempt(backbone, images, request, masking, keeper)
            choice.why_not_removal = why_not if choice.masking == "zero-mask" else ""
            return choice
        except (UnsupportedBackboneError, MaskingError) as error:
            if isinstance(error, MaskingError) and request.masking == "token-removal":
                raise
            rejected.append(error)
        except ReadoutError as error:
            if request.readout == "auto":
                raise
            rejected.append(error)
        except FAILURES as error:
            if isinstance(error, ShapwrapError):
                raise
            if not runs(model, images):
                raise _refused(backbone, images, error) from error
            rejected.append(_broken(backbone, error))
            if isinstance(backbone, TokenBackbone):
                why_not = why_not or str(rejected[-1])
    raise _best(rejected)


def _adapters(model: nn.Module, request: Request) -> list[Backbone]:
    if request.features is None:
        if request.head is not None and not isinstance(request.head, nn.Module):
            raise BackboneTypeError(
                f"head is {request.head!r}; expected nn.Linear, or nn.Sequential that ends in one. "
                "A name or a function goes together with features=."
            )
        return candidates(model)
    own_names = {module: name for name, module in model.named_modules()}
    part = request.head
    if isinstance(part, nn.Module):
        part = own_names.get(part)
    new_head = request.num_classes is not None or (part is None and request.head is not None)
    return [given_parts(model, request.features, part, new_head=new_head)]


def _masking(backbone: Backbone, images: Images, request: Request) -> Masking:
    """Prepares the adapter; "token-removal" once that is proved.

    Raises:
        MaskingError: Removal was asked for, or could be expected, and is not legitimate.
        ImageError: The backbone refuses the size.
    """
    backbone.prepare(images)
    if not isinstance(backbone, TokenBackbone):
        check_image_size(backbone, images)
        if request.masking == "token-removal":
            raise MaskingError(
                f"masking='token-removal' was asked for, but {type(backbone.model).__name__} "
                f"({backbone.family}) mixes patches before any token could be removed. "
                "Use masking='zero-mask'."
            )
        return "zero-mask"
    reads_patches = not backbone.ignores_patches(images)
    backbone.choose_prefix(request.prefix_tokens, head_reads_patches=reads_patches)
    if request.readout == ClassTokenReadout.name:
        _read_class_token(backbone, request, reads_patches=reads_patches)
    check_removal(backbone, images)
    return "zero-mask" if request.masking == "zero-mask" else "token-removal"


def _with_class_token(backbone: Backbone, images: Images, request: Request) -> Choice | None:
    """The readout `class-token`, where the options leave the choice and the model admits it."""
    if not isinstance(backbone, TokenBackbone) or request.readout != "auto":
        return None
    if request.masking == "zero-mask" or request.prefix_tokens == "drop":
        return None
    asked = replace(request, readout=ClassTokenReadout.name)
    try:
        return _attempt(backbone, images, asked, _masking(backbone, images, asked), None)
    except (ShapwrapError, *FAILURES) as error:
        logger.info("%s without its class token: %s", type(backbone.model).__name__, error)
        backbone.reads_class_token = False
        return None


def _read_class_token(backbone: TokenBackbone, request: Request, *, reads_patches: bool) -> None:
    """Keeps the class token and its head.

    Raises:
        ReadoutError: There is none, the patches shall not see it, or nobody can be left out.
    """
    name = type(backbone.model).__name__
    if reads_patches:
        raise ReadoutError(
            f"readout='class-token' was asked for, but the head of {name} reads its patches; "
            "expected a head that reads a class token alone. Use readout='auto'."
        )
    if request.masking == "zero-mask" or request.prefix_tokens == "drop":
        raise ReadoutError(
            f"readout='class-token' came with masking={request.masking!r} and prefix_tokens="
            f"{request.prefix_tokens!r}; expected token removal, with a class token that sees "
            "patches. Leave both options out, or use readout='auto'."
        )
    backbone.read_class_token()


def _keeps_head(backbone: Backbone) -> bool:
    return isinstance(backbone, WholeModel) and isinstance(backbone, TimmFamily | TowerWhole)


def _attempt(
    backbone: Backbone, images: Images, request: Request, masking: Masking, keeper: Backbone | None
) -> Choice:
    """Head and readout on this adapter, compared with the model's own pass.

    Raises:
        UnsupportedBackboneError: The adapter's parts are not the whole model, or its head reads a
            class token and `keeper` can keep that head.
    """
    reads_patches = not backbone.ignores_patches(images)
    if not reads_patches and keeper is not None and request.readout == "auto":
        raise UnsupportedBackboneError(
            f"the head of {type(backbone.model).__name__} reads its class token alone"
        )
    like = backbone.features(images).features.mean(dim=1)
    made = None
    if request.num_classes is not None:
        width = backbone.pre_logits(backbone.read_by_head(like)).shape[1]
        made = new_head(backbone, width, request.num_classes)
    replacement = request.head if isinstance(request.head, nn.Module) else made
    if request.features is not None and backbone.classifiers():
        # The head that was passed is a submodule of the model.
        replacement = None
    cosine = request.readout == CosineReadout.name
    # What is claimed of pooling is proved on the head as it was pretrained.
    head = _make_head(backbone, replacement, like, "auto" if cosine else request.readout)
    hidden, output = backbone.original(images)
    if replacement is not None:
        hidden = head.pre_logits.after_model(hidden)
        output = head.classifier(hidden)
    elif head.reads_logits:
        hidden = output
    else:
        _check_last(backbone, images, output)
    if reads_patches or head.reads_class_token:
        complete = _original_features(backbone, images)
        pooled = head.readout.pooled(complete.mean(dim=1))
        _check_pooling(backbone, "the input of its classifier", hidden, pooled)
        logits = logits_of(head, complete, training=False)
        _check_pooling(backbone, "its logits", output, logits)
    if head.reads_class_token:
        # Not every model can run on a class token without a patch.
        head.readout.nobody()
    if cosine:
        head.read_cosines(backbone)
        output = head.classifier(functional.normalize(hidden, dim=-1))
    return Choice(
        backbone=backbone,
        head=head,
        new_head=replacement,
        masking=masking,
        images=images,
        original=output,
        logit_difference=logit_difference(head, backbone, images, output),
        reads_patches=reads_patches or head.reads_class_token,
        why_not_removal="",
    )


def _check_last(backbone: Backbone, images: Images, output: Tensor) -> None:
    """A layer after the classifier would go unnoticed where that classifier is all zero."""
    classifiers = backbone.classifiers()
    if len(classifiers) == 1 and not comes_last(classifiers[0], backbone.model, images, output):
        raise UnsupportedBackboneError(
            f"{type(backbone.model).__name__} ({backbone.family}) does more after its classifier: "
            "its output is not what that layer returns."
        )


def logit_difference(head: Head, backbone: Backbone, images: Images, original: Tensor) -> float:
    """Largest difference between the wrapped model's logits and `original`."""
    logits = logits_of(head, backbone.features(images).features, training=False)
    return float((logits - original).abs().max())


def _make_head(
    backbone: Backbone, replacement: nn.Module | None, like: Tensor, readout: str
) -> Head:
    try:
        head = Head(backbone, replacement, like, readout)
        head.classifier(head.readout.pooled(like))
        return head
    except RuntimeError as error:
        if replacement is None or isinstance(error, ShapwrapError):
            raise
        width = backbone.pre_logits(backbone.read_by_head(like)).shape[1]
        raise ReadoutError(
            f"head does not take the {width} features that the classifier of "
            f"{type(backbone.model).__name__} reads ({error}); expected nn.Linear({width}, "
            "classes), or nn.Sequential that begins with such a layer."
        ) from error


def _original_features(backbone: Backbone, images: Images) -> Tensor:
    """Patch features as the model itself computes them."""
    if isinstance(backbone, TokenBackbone):
        tokens = backbone.original_tokens(images)
        everyone = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        num_prefix = tokens.shape[1] - backbone.embed(images).patches.shape[1]
        # The model itself has its prefix, whatever becomes of it in the wrapped one.
        chosen, backbone.prefix_tokens = backbone.prefix_tokens, "keep"
        try:
            return backbone.read(tokens, everyone, num_prefix, copies=1)
        finally:
            backbone.prefix_tokens = chosen
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
            f"the mean changes {what} by {error:.2g}. Leave head= and readout= out to keep the "
            "model's own head whole, or pass features= whose mean it reads."
        )


def _refused(backbone: Backbone, images: Images, error: Exception) -> ShapwrapError:
    (height, width), built_for = images.shape[-2:], backbone.image_size()
    name = type(backbone.model).__name__
    if (height, width) != built_for:
        return ImageError(
            f"{name} refuses images of {height} x {width} pixels ({error}); it was built for "
            f"{built_for[0]} x {built_for[1]}. Leave image_size= out, or build the model for this "
            "size."
        )
    return UnsupportedBackboneError(
        f"{name} fails on images [B, {images.shape[1]}, {height}, {width}] "
        f"({type(error).__name__}: {error}); expected a vision model. If it takes another size, "
        "pass image_size=(height, width)."
    )


def _broken(backbone: Backbone, error: Exception) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"the parts of {type(backbone.model).__name__} ({backbone.family}) cannot be run on their "
        f"own ({type(error).__name__}: {error})"
    )


def _best(rejected: list[ShapwrapError]) -> ShapwrapError:
    """The error that helps most: why the first adapter fell short, or the one that tries last."""
    for kind in (ReadoutError, UnsupportedBackboneError, MaskingError):
        for error in rejected:
            if isinstance(error, kind):
                return error
    return rejected[0]
