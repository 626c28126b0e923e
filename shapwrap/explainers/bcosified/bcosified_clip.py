"""B-cosified CLIP: a tower distilled into a linear map of the image explains similarities."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.backbones.base import Normalization
from shapwrap.clip.texts import Texts, Tokenizer, strings_of
from shapwrap.errors import (
    ArgumentError,
    ImageError,
    MissingDependencyError,
    TrainingError,
)
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.bcosified.config import BcosifiedConfig
from shapwrap.explainers.bcosified.dynamic import set_b
from shapwrap.explainers.bcosified.explained_tower import ExplainedTower
from shapwrap.explainers.bcosified.linear_summary import linear_summary
from shapwrap.explainers.bcosified.similarity import BcosifiedSimilarity, Reading
from shapwrap.explainers.bcosified.texts import embeddings_of, tower_of
from shapwrap.explainers.bcosified.tower import BcosifiedTower, bcosify
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.trained.data import first_images
from shapwrap.explainers.trained.surrogate import precision_of
from shapwrap.explanation import Explanation
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import without_autocast
from shapwrap.probing import runs

Channels = Literal["normalised", "pixels"]
"""Contributions of the channels that the tower reads, or of [x, 1 - x] with x in 0 ... 1."""


class BcosifiedCLIP(Explainer):
    """Contributions x * W(x) of pixels to the similarity of an image and a text.

    The model that is explained is not the given one but its B-cosified copy, trained to give the
    same embeddings: `fit(data)`, or `load_state_dict`. Classes are the texts; `logits` are the
    copy's similarities, to which the values of one text sum exactly.

    Args:
        model: An open_clip model with a ModifiedResNet, a `ZeroShotClassifier` of one, that tower
            alone, or a B-cosified tower that is trained already. It is copied, never changed.
        texts: Strings, token ids [T, L], or embeddings [T, E]; the latter for a tower alone.
        tokenizer: From strings to token ids.
        config: Settings of the training.
        reading: "pooled" explains the cosine with the pooled embedding, in pixels. "attn_unpool"
            explains, in pixels, the mean over places of the cosine of what the value and output
            projections make of each place; "attn_unpool_map" gives these cosines, over their
            number, as values of the places.
        cosine_power: p >= 1: places count as c |c|^(p - 1) in the two readings of places.
        channels: "normalised" sums exactly to the similarity. "pixels" is what the authors' code
            shows: the same weights on channels whose mean was not taken off; no sum is claimed.
        normalization: Mean and deviation of the channels; by default what the tower states.
        grid: Rows and columns of patches; by default the places of the tower's last map.
        chunk_size: Images that go through the tower at a time.

    Raises:
        UnsupportedBackboneError: Another image tower than a ModifiedResNet.
        ArgumentError: Texts that cannot be embedded, or an option outside its range.
        BackboneTypeError: No module.

    References:
        Arya, Rao, Boehle & Schiele 2024, "B-cosification: Transforming Deep Neural Networks to be
        Inherently Interpretable".
    """

    name = "b-cosified"
    config: BcosifiedConfig

    def __init__(
        self,
        model: Model,
        texts: Texts,
        *,
        tokenizer: Tokenizer | None = None,
        config: BcosifiedConfig | None = None,
        reading: Reading | str = "pooled",
        cosine_power: float = 1.0,
        channels: Channels | str = "normalised",
        normalization: Normalization | None = None,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        self.config = config or BcosifiedConfig()
        tower = tower_of(model)
        ready = isinstance(tower, BcosifiedTower)
        self._original = None if ready else tower
        self._normalization = normalization
        made = deepcopy(tower) if isinstance(tower, BcosifiedTower) else self._bcosified()
        embeddings = embeddings_of(model, texts, tokenizer, made.body.attnpool.c_proj.out_features)
        similarity = BcosifiedSimilarity(
            made,
            embeddings.to(precision_of(made)),
            reading=reading,
            cosine_power=cosine_power,
        )
        super().__init__(similarity, grid=grid, chunk_size=chunk_size)
        self.model = self._explained = ExplainedTower(similarity, grid=grid)
        self._check_channels(channels, made, reading, grid)
        if reading != "pooled":
            self.name = f"b-cosified-{reading.replace('_', '-')}"
        self._channels = channels
        self._texts = strings_of(texts)
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Records of the stage "distillation", as the Trainer keeps them."""
        self._trained = ready
        if ready:
            self._keep(made)

    # --- training -----------------------------------------------------------------------------

    @classmethod
    def train(
        cls, model: Model, texts: Texts, data: Iterable[Any], **options: Any
    ) -> "BcosifiedCLIP":
        """A trained explainer; see `fit` for the data and the errors, and the class for options."""
        return cls(model, texts, **options).fit(data)

    def fit(self, data: Iterable[Any], *, resume: bool = False) -> "BcosifiedCLIP":
        """The explainer itself, after the B-cosified tower has learned the original's embeddings.

        Args:
            data: Batches of images, normalised as the original was trained, or of (images, labels),
                of one size; labels are not read. It is iterated once an epoch.
            resume: Go on from the newest checkpoint in the stage's `output_dir`; without one,
                training starts anew.

        Raises:
            MissingDependencyError: accelerate is not installed.
            TrainingError: Data that cannot be used, a loss that is not finite, or no original.
            ImageError: Images of several sizes, or that the original refuses.
        """
        try:
            from shapwrap.explainers.bcosified.distillation import Distillation, has_started
        except ImportError as error:
            raise MissingDependencyError(
                f"training needs accelerate and tqdm ({error}); pip install 'shapwrap[train]'."
            ) from error
        if self._original is None:
            raise TrainingError(
                "this explainer was made of a B-cosified tower, without the tower that it should "
                "learn from; expected the original. Make one: BcosifiedCLIP(original, texts)."
            )
        original, settings = self._original, self.config.distillation
        images = first_images(data)[:1].to(next(original.parameters()).device)
        self.model.check(images)
        # A caller may have switched gradients off.
        with (
            evaluation_mode(list(original.modules())),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            self._check_size(original, images)
            made = self._bcosified().train()
            like = self._explained.cast(images)
            stage = Distillation(made, original, data, like, config=self.config)
            records = stage.fit(resume=resume and has_started(settings))
        # A ramp over all steps ends one step short of B.
        set_b(made, self.config.b)
        self.history = {"distillation": records}
        self._keep(made.to(next(original.parameters()).device))
        return self

    # --- explaining ---------------------------------------------------------------------------

    def __call__(self, images: Tensor, target: int | Tensor | None = None) -> Explanation:
        """Explanation of the similarity of each image with one text.

        Args:
            images: Float [B, C, H, W], normalised as the model was trained; of any size from 31
                pixels on.
            target: Index of the text, or one for each image as int64 [B]; the text of the highest
                similarity if None.

        Raises:
            TrainingError: Nothing was trained or loaded.
            ImageTypeError: Images that are not floating point.
            ImageError: A shape that the tower refuses, or pixels that are not finite.
            TargetError: A text that there is not.
        """
        self._check_trained()
        if isinstance(images, Tensor):
            self._explained.similarity.to(images.device)
        return replace(super().__call__(images, target), class_names=self._texts)

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """One forward and one backward pass of the tower; for the map of places no backward."""
        similarity = self._explained.similarity
        images = self._explained.cast(images)
        parts = zip(images.split(self.chunk_size), target.split(self.chunk_size), strict=True)
        if similarity.reading == "attn_unpool_map":
            made = torch.cat([self._places(part, texts) for part, texts in parts])
            return Attribution(made, self.model.native_grid(images), total=made.sum(dim=1))
        pixels, scores = [], []
        for part, texts in parts:
            summary = linear_summary(similarity, part, texts)
            if self._channels == "pixels" and self.model.normalization is not None:
                pixels.append(in_full(summary.pixel_contributions(self.model.normalization)))
            else:
                pixels.append(in_full(summary.contributions()))
                scores.append(in_full(summary.score))
        return self.of_pixels(torch.cat(pixels), images, torch.cat(scores) if scores else None)

    @property
    def tower(self) -> BcosifiedTower:
        """The trained B-cosified tower, images to embeddings [B, E].

        Raises:
            TrainingError: Nothing was trained or loaded.
        """
        self._check_trained()
        return self._explained.similarity.tower

    # --- what is kept -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The B-cosified tower, as tensors; the texts are not part of it.

        Raises:
            TrainingError: Nothing was trained or loaded.
        """
        return dict(self.tower.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> "BcosifiedCLIP":
        """The explainer itself, with the tower as it was when `state` was taken.

        Raises:
            ArgumentError: The state is of another tower.
        """
        made = deepcopy(self._explained.similarity.tower) if self._original is None else None
        made = self._bcosified() if made is None else made
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise ArgumentError(
                f"the state does not fit this {self.name} explainer ({error}); expected one of a "
                "tower of the same size."
            ) from error
        self._keep(made)
        return self

    def _keep(self, tower: BcosifiedTower) -> None:
        self._explained.similarity.tower = tower.eval().requires_grad_(False)
        self._trained = True

    def _check_trained(self) -> None:
        if not self._trained:
            raise TrainingError(
                f"this {self.name} explainer is not trained; call fit(data), or "
                "load_state_dict(state), or make it of a tower that is B-cosified and trained."
            )

    # --- parts --------------------------------------------------------------------------------

    def _bcosified(self) -> BcosifiedTower:
        """An untrained tower; nothing in it is drawn."""
        if self._original is None:
            raise TrainingError("there is no original tower; expected one to B-cosify.")
        return bcosify(
            self._original,
            b=self.config.b,
            factor=self.config.factor,
            normalization=self._normalization,
        )

    @torch.no_grad()
    def _places(self, images: Images, target: Int[Tensor, " batch"]) -> Tensor:
        similarity = self._explained.similarity
        with without_autocast(images):
            found = similarity.of_places(similarity.tower.encode(images))
        asked = found.gather(2, target[:, None, None].expand(-1, found.shape[1], 1))
        return in_full(asked[:, :, 0] / found.shape[1])

    @torch.no_grad()
    def _check_size(self, original: nn.Module, images: Images) -> None:
        if not runs(original, images.to(precision_of(original))):
            raise ImageError(
                f"the original tower refuses images of {images.shape[-2]} x {images.shape[-1]} "
                f"pixels; it was built for {self._explained.similarity.tower.image_size}. Resize "
                "the training images."
            )

    @staticmethod
    def _check_channels(
        channels: Channels | str,
        tower: BcosifiedTower,
        reading: Reading | str,
        grid: Grid | None,
    ) -> None:
        if channels not in get_args(Channels):
            raise ArgumentError(f"channels is {channels!r}; expected one of {get_args(Channels)}.")
        of_places = reading == "attn_unpool_map"
        if of_places and (grid is not None or channels == "pixels"):
            raise ArgumentError(
                f"grid is {grid} and channels {channels!r} with reading='attn_unpool_map', whose "
                "values are those of the places of the tower's last map; expected neither. Use "
                "reading='attn_unpool'."
            )
        if channels == "pixels" and tower.normalization is None:
            raise ArgumentError(
                "channels='pixels' needs the mean and the deviation of the channels, which this "
                "tower does not state; pass normalization=Normalization(mean, std)."
            )
