"""ShapleyWrapper: any pretrained backbone, made to explain itself."""

import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from shapwrap import audit as auditing
from shapwrap._types import CoalitionValues, Grid, Logits, Pairing, PatchFeatures, PatchValues
from shapwrap.arguments import check_arguments
from shapwrap.backbones.image_text import reads_texts
from shapwrap.backbones.stride_one import restore
from shapwrap.choosing import Request
from shapwrap.coalitions.checks import (
    are_complement_pairs,
    check_coalitions,
    resolve_pairing,
)
from shapwrap.coalitions.sampling import Distribution
from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.explanation import Explanation, check_target
from shapwrap.facts import Facts
from shapwrap.images import check_finite, check_images
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import without_autocast
from shapwrap.report import Report, count_parameters, report_on
from shapwrap.sharing import Sharing
from shapwrap.values import game
from shapwrap.values.output import ShapleyOutput
from shapwrap.values.patch_game import PatchGame, PatchGames
from shapwrap.wrapping import unused_parameters, wrap


class ShapleyWrapper(Facts, Sharing, nn.Module):
    """A drop-in replacement of a model whose logits are sums of patch values.

    For an image x of N patches and K classes the wrapped model has patch values phi(x), [N, K],
    with f(x) = sum of phi(x) over patches, and the value of a coalition v(s) = sum of phi(x_s) over
    present patches, where x_s is the image with the absent patches hidden before they can influence
    anything. A head that reads a class token keeps it: then `baseline` is what it says of nobody,
    f(x) = baseline + sum of phi(x), and v(s) = f(x_s) - baseline. Trained with `shapley_loss`, phi
    becomes the Shapley value of v.

    The model object is used, not copied: it keeps its weights, its device and its train or eval
    mode. Attributes that the wrapper lacks are looked up on the model.

    Args:
        model: A timm or torchvision classifier, a module built like one, or the image tower of an
            open_clip model (`model.visual`, with `head` or `num_classes`). For a whole open_clip
            model the result is a `ShapleyCLIP`.
        masking: How absent patches are hidden. "token-removal" removes tokens before the first
            block, "zero-mask" sets pixels to zero, "auto" removes tokens where a test on the
            model proves that this is legitimate.
        readout: How the pretrained head is shared among patches: "affine", "shared-norm", "gap",
            "efficiency-gap", "class-token", or "auto" for the most local one that is exact;
            "cosine" compares the direction of each patch's embedding, as `ShapleyCLIP` does.
        grid: Rows and columns of patches. Finer than the backbone's own, it runs the last stages
            of a convolutional backbone at stride 1, as the paper does for ResNet-50.
        features: For a model of your own, where its patches are: the name of a submodule, or a
            function of the images, that gives a map [B, D, h, w] or patch tokens [B, N, D].
        head: Replaces the classifier: nn.Linear, or nn.Sequential that ends in one, on the
            features that the pretrained classifier reads. With `features` also the name of a
            submodule, or a function, from pooled features [M, D] to logits [M, K].
        num_classes: Replaces the classifier by a new linear layer of this many classes, all zero.
        prefix_tokens: Whether patches see class and register tokens: "drop" as in the paper,
            "keep", or "auto": kept where the pretrained head stays exact with them, a class token
            that it reads among them.
        image_size: Height and width for which grid and report hold; by default those that the
            model was built for. Other sizes work where the backbone allows them.
        class_names: Names of the classes, for figures; by default those that the model tells.

    Raises:
        BackboneTypeError: Not an nn.Module instance, or wrapped already.
        UnsupportedBackboneError: No adapter reproduces the model from its parts.
        MissingHeadError: No classifier, and neither `head` nor `num_classes`.
        ReadoutError: `readout` is not exact for this head, or the head does not end in a linear
            layer.
        MaskingError: "token-removal" for a backbone that mixes patches before any token slot.
        GridError: The backbone cannot have this grid.
        ImageError: The backbone refuses `image_size`.
        ArgumentError: An unknown option.

    References:
        Fan, Yang & Ma 2026, "Enhancing Interpretability for Vision Models via Shapley Value
        Optimization", AAAI-26, Eq. 5 to 10.
    """

    def __new__(cls, model: object = None, **options: Any) -> Self:
        """A `ShapleyCLIP` for a model of images and texts, else a wrapper of this class."""
        if cls is ShapleyWrapper and reads_texts(model):
            from shapwrap.clip import wrap_image_text

            return cast(Self, wrap_image_text(model, options))
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        *,
        masking: str = "auto",
        readout: str = "auto",
        grid: Grid | None = None,
        features: str | Callable[[Tensor], Tensor] | None = None,
        head: nn.Module | str | Callable[[Tensor], Tensor] | None = None,
        num_classes: int | None = None,
        prefix_tokens: str = "auto",
        image_size: tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        if isinstance(model, ShapleyWrapper):
            raise BackboneTypeError(
                "model is wrapped already; use it as it is, or wrap model.unwrap() anew."
            )
        check_arguments(model, features, head, grid, image_size, num_classes)
        modes = {module: module.training for module in model.modules()}
        self._wrapping, new_head = wrap(
            model,
            Request(masking, readout, features, head, num_classes, prefix_tokens, image_size),
            grid,
        )
        self.model = model
        self.new_head = new_head
        self.patch_layer = self._wrapping.head.patch_layer
        self.training = modes[model]
        unused = unused_parameters(self._wrapping, new_head)
        self._frozen = [parameter for parameter in unused if parameter.requires_grad]
        for parameter in self._frozen:
            # Nothing reads them any more; DDP would wait for their gradients.
            parameter.requires_grad_(False)
        self._params_before = count_parameters(model)
        self._unwrapped = False
        self._class_names = None if class_names is None else list(class_names)
        if self._class_names is not None and len(self._class_names) != self.num_classes:
            self.unwrap()
            raise ArgumentError(
                f"class_names has {len(self._class_names)} names; expected {self.num_classes}, "
                "one for each class of this model."
            )

    # --- the model, as a function -------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        coalitions: Tensor | None = None,
        *,
        paired: Pairing | str | None = None,
    ) -> Logits | ShapleyOutput:
        """Logits [B, K]; with coalitions a `ShapleyOutput` of both branches, for `shapley_loss`.

        Both branches run in this one call, so DDP and FSDP see one forward pass a step. Shapes
        and types are checked, values are not: a training step never waits for the device.

        Args:
            images: Float [B, C, H, W], normalised as the model was trained.
            coalitions: Bool [B, S, N], True where a patch is present.
            paired: Whether coalition 2i + 1 is the complement of 2i, which halves the work of a
                token model; "across": whether those of image 2i + 1 are the complements of those
                of image 2i, which does too. None looks; on a CUDA tensor that waits for the device,
                and under torch.compile it cannot look and takes them one by one. What is said is
                checked on the CPU.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape, channel number, device or size that the model refuses.
            CoalitionTypeError: Coalitions that are not boolean.
            CoalitionError: Coalitions of another shape, or that are not paired as said.
            ArgumentError: An unknown pairing.
        """
        self._check(images)
        features = self._features(images)
        head = self._wrapping.head
        if coalitions is None:
            with without_autocast(images):
                return game.logits_of(head, features, training=self.training)
        check_coalitions(coalitions, images.shape[0], features.shape[1])
        paired = resolve_pairing(coalitions, paired)
        coalitions = coalitions.to(images.device, non_blocking=True)
        means = self._wrapping.masked_means(images, coalitions, paired)
        with without_autocast(images):
            drawn = game.draw(head, features, training=self.training)
            logits, estimates = game.logits_and_estimates(head, features, coalitions, *drawn)
            values = game.values_of(head, means, coalitions, *drawn)
        return ShapleyOutput(logits, values, estimates)

    def attribute(self, images: Tensor) -> PatchValues:
        """Patch values phi(x), [B, N, K] in logits, float32 (float64 for a float64 model).

        `phi.sum(1)` equals the logits minus `baseline`. Gradients flow; train or eval mode is
        the current one, without dropout in the head.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.

        References:
            Fan, Yang & Ma 2026, Eq. 6.
        """
        self._check(images, finite=True)
        features = self._features(images)
        with without_autocast(images):
            return game.patch_values(self._wrapping.head, features)

    def value(
        self, images: Tensor, coalitions: Tensor, *, chunk_size: int | None = None
    ) -> CoalitionValues:
        """Values v(s) of coalitions, [B, S, K] in logits: 0 for nobody.

        For everybody the logits, minus `baseline` where there is one.

        Args:
            images: Float [B, C, H, W].
            coalitions: Bool [B, S, N].
            chunk_size: Coalitions an image that run at a time; all by default.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
            CoalitionTypeError: Coalitions that are not boolean.
            CoalitionError: Coalitions of another shape.
            ArgumentError: A chunk size below 1.

        References:
            Fan, Yang & Ma 2026, Eq. 9, 10 and 13.
        """
        self._check(images, finite=True)
        check_coalitions(coalitions, images.shape[0], self.patches_of(images))
        if chunk_size is not None and chunk_size < 1:
            raise ArgumentError(f"chunk_size is {chunk_size}; expected at least 1.")
        paired, head = are_complement_pairs(coalitions), self._wrapping.head
        step = chunk_size or coalitions.shape[1]
        step = max(2, step // 2 * 2) if paired else step
        with without_autocast(images):
            baseline = game.baseline_of(head)
        parts = []
        for part in coalitions.to(images.device).split(step, dim=1):
            means = self._wrapping.masked_means(images, part, paired)
            with without_autocast(images):
                parts.append(game.values_of(head, means, part, None, baseline))
        return torch.cat(parts, dim=1)

    # --- explanations -------------------------------------------------------------------------

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,
        target: int | Tensor | None = None,
        *,
        contrast: bool = False,
        all_classes: bool = False,
    ) -> Explanation:
        """Explanation of one class of each image, from one forward pass in eval mode.

        Args:
            images: Float [B, C, H, W], normalised as the model was trained.
            target: Class index, or one for each image as int64 [B]; the predicted class if None.
            contrast: Take the mean over classes off the values. Logits are defined up to a
                constant, so this is an equally efficient allocation of the centred logit, and
                reads more clearly.
            all_classes: Keep the values of the other classes too, `all_values` [B, N, K].

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
            TargetError: A class that the model does not have.
        """
        self._check(images, finite=True)
        head = self._wrapping.head
        with evaluation_mode(self.modules()):
            features = self._features(images)
            with without_autocast(images):
                scores = head.readout.patch_scores(head.readout.embed(features))
                logits = head.classifier(scores.mean(dim=1))
                classes = check_target(target, logits)
                values = game.target_values(head, scores, classes, contrast=contrast)
                every = game.class_values(head, scores, contrast=contrast) if all_classes else None
        return Explanation(
            values=values,
            logits=logits,
            target=classes,
            grid=self.grid_of(images),
            image_size=(images.shape[-2], images.shape[-1]),
            contrast=contrast,
            class_names=self.class_names,
            normalization=self.normalization,
            baseline=self.baseline,
            covered=self.covered(images),
            all_values=every,
        )

    @torch.no_grad()
    def audit(
        self,
        images: Tensor,
        *,
        num_coalitions: int = 32,
        distribution: Distribution | str = "shapley",
        generator: torch.Generator | None = None,
        chunk_size: int = 8,
    ) -> auditing.Audit:
        """Residual and skill of the explanations of these images, over fresh coalitions.

        Args:
            images: Float [B, C, H, W].
            num_coalitions: Coalitions an image, in complement pairs.
            distribution: Of coalition sizes; "shapley" is what the loss trains on.
            generator: Source of randomness; a new one with seed 0 if None.
            chunk_size: Coalitions an image that run at a time.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
            ArgumentError: An odd number of coalitions, or a chunk below 2.
        """
        num_patches = self.patches_of(images)
        with evaluation_mode(self.modules()):
            return auditing.audit(
                lambda images, coalitions: self(images, coalitions, paired=True),
                images,
                num_patches,
                num_coalitions=num_coalitions,
                distribution=distribution,
                generator=generator,
                chunk_size=chunk_size,
            )

    def game(
        self,
        image: Tensor,
        target: int | None = None,
        *,
        players: Grid | None = None,
        chunk_size: int = 64,
    ) -> PatchGame:
        """The game of one class of one image, callable on masks [n, N]; shapiq can play it too.

        Args:
            image: Float [C, H, W] or [1, C, H, W].
            target: Class index; the predicted class if None.
            players: Rows and columns of a coarser grid whose cells are the players.
            chunk_size: Coalitions that run at a time.

        Raises:
            ImageTypeError: An image that is not floating point.
            ImageError: More than one image, a size that the model refuses, or bad pixels.
            TargetError: A class that the model does not have.
            ArgumentError: Players finer than the patches, or a chunk below 1.
        """
        image = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
        self._check(image, finite=True)
        games = PatchGames(self, image, self._wrapping.grid_of(image), players, chunk_size)
        return PatchGame(games, check_target(target, games.grand_values + self.baseline))

    # --- the model, as a model ----------------------------------------------------------------

    def grid_of(self, images: Tensor) -> Grid:
        """Rows and columns of patches of these images, whose size may be another.

        Raises:
            ImageError: A size that the backbone refuses.
        """
        self._check(images)
        return self._wrapping.grid_of(images)

    def patches_of(self, images: Tensor) -> int:
        """N of these images, whose size may be another than the model was wrapped for.

        Raises:
            ImageError: A size that the backbone refuses.
        """
        return math.prod(self.grid_of(images))

    def covered(self, images: Tensor) -> tuple[int, int]:
        """Height and width in pixels over which the patches lie, from the upper left corner."""
        size = (images.shape[-2], images.shape[-1])
        return self._wrapping.backbone.covered(size, self.grid_of(images))

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the classifier, for a learning rate of their own."""
        return self._wrapping.head.parameters()

    def report(self) -> Report:
        """A printable summary: what was chosen, what was measured, what to know before use."""
        self._check_in_use()
        new_head = not isinstance(self.new_head, NoneType | nn.Identity)
        return report_on(self, self.model, self._wrapping, self._params_before, new_head=new_head)

    def unwrap(self) -> nn.Module:
        """The original model, its structure and mode as they were, its weights as trained.

        The wrapper cannot be used afterwards. A `head` that was passed in stays with the caller.
        """
        self._check_in_use()
        restore(self._wrapping.stride_changes)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._unwrapped = True
        return self.model

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model, where the wrapper has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While unpickling there is no model yet; asking it would ask for it again.
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    # --- parts of a pass ----------------------------------------------------------------------

    def _features(self, images: Tensor) -> PatchFeatures:
        return self._wrapping.backbone.features(images).features

    def _check(self, images: Tensor, *, finite: bool = False) -> None:
        self._check_in_use()
        backbone = self._wrapping.backbone
        check_images(images, backbone.in_channels(), backbone.parameter)
        self._wrapping.grid_of(images)
        if finite:
            check_finite(images)

    def _check_in_use(self) -> None:
        if self._unwrapped:
            raise BackboneTypeError(
                "this wrapper was unwrapped and its model is as it was before; wrap it again with "
                "ShapleyWrapper(model)."
            )
