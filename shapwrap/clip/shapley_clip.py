"""ShapleyCLIP: an image-text model whose similarities are sums over patches."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from shapwrap import audit as auditing
from shapwrap._types import CoalitionValues, Grid, Pairing, PatchValues
from shapwrap.backbones.base import Normalization
from shapwrap.backbones.image_text import has_scale, reads_texts
from shapwrap.clip.matching import MatchedModel, explain_pairs, matched_pairs
from shapwrap.clip.output import ContrastiveOutput, Embeddings, similarities
from shapwrap.clip.report import ImageTextReport, report_on_towers
from shapwrap.clip.texts import Texts, Tokenizer, strings_of, text_embeddings, tokens_of
from shapwrap.coalitions.sampling import Distribution
from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.explanation import Explanation
from shapwrap.images import check_finite
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import compute_dtype
from shapwrap.sharing import Sharing
from shapwrap.values.output import ShapleyOutput
from shapwrap.values.patch_game import PatchGame, PatchGames
from shapwrap.wrapper import ShapleyWrapper


class ShapleyCLIP(Sharing, nn.Module):
    """A drop-in replacement of an image-text model whose similarities are sums over patches.

    Each patch has an embedding e_p, by the image tower's own final norm and projection. For a text
    t its value is phi_p = cos(e_p, t) / N; the image embedding is the sum of e_p / (N |e_p|), not
    normalised again, so its dot product with t is the sum of the phi_p. The text tower stays as it
    is. What `encode_image` and `forward` return fits open_clip's training and zero-shot code.

    The model object is used, not copied: it keeps its weights, its device and its modes. Attributes
    that this class lacks are looked up on the model.

    Args:
        model: An open_clip model, or one built like it: `visual`, `encode_text`, `logit_scale`.
        masking: As in `ShapleyWrapper`.
        grid: As in `ShapleyWrapper`.
        prefix_tokens: As in `ShapleyWrapper`.
        image_size: As in `ShapleyWrapper`.
        tokenizer: From strings to token ids, such as `open_clip.get_tokenizer(name)`, so that texts
            may be given as strings.

    Raises:
        BackboneTypeError: No model of images and texts, or wrapped already.
        ShapwrapError: What `ShapleyWrapper` says of the image tower.

    References:
        Fan, Yang & Ma 2026, "Enhancing Interpretability for Vision Models via Shapley Value
        Optimization", AAAI-26, section on contrastive language-image pre-trained models.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        masking: str = "auto",
        grid: Grid | None = None,
        prefix_tokens: str = "auto",
        image_size: tuple[int, int] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        if not reads_texts(model) or not has_scale(model):
            raise BackboneTypeError(
                f"model is {type(model).__name__}; expected an image-text model with `visual`, "
                "`encode_text` and a tensor `logit_scale`, such as open_clip.create_model(name). "
                "For a tower or a classifier use ShapleyWrapper."
            )
        if isinstance(model, ShapleyCLIP):
            raise BackboneTypeError(
                "model is wrapped already; use it as it is, or wrap model.unwrap() anew."
            )
        self._options: dict[str, Any] = {
            "masking": masking,
            "prefix_tokens": prefix_tokens,
            "image_size": image_size,
        }
        visual: Any = model.visual
        tower = ShapleyWrapper(
            visual, head=nn.Identity(), readout="cosine", grid=grid, **self._options
        )
        self.model = model
        # Not a submodule: its weights are those of model.visual, and would be listed twice.
        object.__setattr__(self, "tower", tower)
        self.tower: ShapleyWrapper
        self.tokenizer = tokenizer
        self.training = model.training

    # --- as open_clip's models ----------------------------------------------------------------

    def encode_image(self, image: Tensor, normalize: bool = False) -> Embeddings:
        """Image embeddings [B, E], sums of the patches' unit embeddings over N, in float32.

        Args:
            image: Float [B, C, H, W], normalised as the model was trained.
            normalize: Taken as open_clip's models take it, and ignored: another normalisation would
                break the sum. Their length, at most 1, says how much the patches agree.

        Raises:
            ImageTypeError: Images that are not floating point.
            ImageError: A shape, channel number, device or size that the model refuses.
        """
        embeddings: Any = self.tower(image)
        return embeddings

    def encode_text(self, text: Texts, normalize: bool = False) -> Tensor:
        """Text embeddings [T, E], as the model itself makes them, in at least float32.

        Images' embeddings are, and the two are multiplied.

        Args:
            text: Token ids [T, L], or strings where there is a tokenizer.
            normalize: Whether to bring them to unit length.

        Raises:
            ArgumentError: Something else, or no text.
        """
        encoder: Any = self.model
        embeddings = encoder.encode_text(self._tokens(text), normalize=normalize)
        return embeddings.to(compute_dtype(embeddings))

    def get_logits(self, image: Tensor, text: Texts) -> tuple[Tensor, Tensor]:
        """Logits image by text [B, T], and their transpose."""
        scale, bias = self._scale_and_bias()
        logits = similarities(self.encode_image(image), self.encode_text(text, normalize=True))
        logits = logits * scale if bias is None else logits * scale + bias
        return logits, logits.T

    def forward(
        self,
        image: Tensor | None = None,
        text: Texts | None = None,
        coalitions: Tensor | None = None,
        *,
        paired: Pairing | str | None = None,
    ) -> Any:
        """What open_clip's CLIP returns; with coalitions a `ContrastiveOutput` of both branches.

        Without coalitions: (image features, text features, scale), and the bias where there is one,
        or a dictionary of them where the model was built with `output_dict`. All of a step runs in
        this one call, so DDP and FSDP see one forward pass. CoCa's captions are left out; its own
        `clip.model(image, text)` has them.

        Args:
            image: Float [B, C, H, W]; may be left out without coalitions.
            text: As in `encode_text`; may be left out without coalitions.
            coalitions: Bool [B, S, N], True where a patch is present.
            paired: As in `ShapleyWrapper`.

        Raises:
            ArgumentError: Coalitions without images and texts.
            ShapwrapError: What `ShapleyWrapper` says of images and coalitions.
        """
        scale, bias = self._scale_and_bias()
        if coalitions is not None:
            if image is None or text is None:
                raise ArgumentError("coalitions came without image or text; expected all three.")
            embedded: ShapleyOutput = self.tower(image, coalitions, paired=paired)
            texts = self.encode_text(text, normalize=True)
            return ContrastiveOutput(
                embedded.logits, texts, scale, bias, embedded.values, embedded.estimates
            )
        images = None if image is None else self.encode_image(image)
        texts = None if text is None else self.encode_text(text, normalize=True)
        if not getattr(self.model, "output_dict", False):
            return (images, texts, scale) if bias is None else (images, texts, scale, bias)
        found = {"image_features": images, "text_features": texts, "logit_scale": scale}
        return found if bias is None else {**found, "logit_bias": bias}

    # --- the game -----------------------------------------------------------------------------

    def attribute(self, images: Tensor, texts: Texts) -> PatchValues:
        """Patch values phi(x), [B, N, T], similarities; they sum to `encode_image` times the text.

        The patches are encoded once, however many texts there are.

        Args:
            images: Float [B, C, H, W].
            texts: Strings, token ids [T, L], or embeddings [T, E].

        Raises:
            ArgumentError: No texts, or strings without a tokenizer.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
        """
        return similarities(self.tower.attribute(images), self.text_features(texts))

    def value(
        self,
        images: Tensor,
        texts: Texts,
        coalitions: Tensor,
        *,
        chunk_size: int | None = None,
    ) -> CoalitionValues:
        """Values v(s), [B, S, T], similarities: 0 for nobody, those of the image for everybody.

        Args:
            images: Float [B, C, H, W].
            texts: Strings, token ids [T, L], or embeddings [T, E].
            coalitions: Bool [B, S, N].
            chunk_size: Coalitions an image that run at a time; all by default.

        Raises:
            ArgumentError: No texts, strings without a tokenizer, or a chunk size below 1.
            ShapwrapError: What `ShapleyWrapper.value` says of images and coalitions.
        """
        values = self.tower.value(images, coalitions, chunk_size=chunk_size)
        return similarities(values, self.text_features(texts))

    def text_features(self, texts: Texts) -> Embeddings:
        """Unit embeddings [T, E] of texts in any form, in at least float32.

        Raises:
            ArgumentError: No texts, or strings without a tokenizer.
        """
        return text_embeddings(
            texts,
            self.encode_text,
            self.tokenizer,
            self.tower.num_classes,
            next(self.model.parameters()).device,
        )

    # --- explanations -------------------------------------------------------------------------

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,
        texts: Texts,
        *,
        pairs: Literal["matching", "best", "all"] | str = "matching",
        contrast: bool = False,
        all_classes: bool = False,
    ) -> Explanation:
        """Explanation of image-text pairs, from one forward pass of each tower in eval mode.

        Args:
            images: Float [B, C, H, W].
            texts: Strings, token ids [T, L], or embeddings [T, E].
            pairs: "matching" explains image i with text i, or with the only text; "best" with its
                best text; "all" every image with every text, B * T rows, the first image's first.
            contrast: Take the mean over texts off the values: what speaks for this text rather than
                for the others. Needs several texts.
            all_classes: Keep the values of all texts too, `all_values` [rows, N, T].

        Raises:
            ArgumentError: Not one text an image for matching pairs, an unknown `pairs`, a contrast
                with one text, no texts, or strings without a tokenizer.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
        """
        with evaluation_mode(self.modules()):
            embeddings = self.tower.attribute(images)
            features = self.text_features(texts)
        return explain_pairs(
            *(self.tower, images, embeddings, features),
            matched_pairs(pairs, embeddings, features),
            strings_of(texts),
            contrast=contrast,
            all_classes=all_classes,
        )

    @torch.no_grad()
    def audit(
        self,
        images: Tensor,
        texts: Texts,
        *,
        num_coalitions: int = 32,
        distribution: Distribution | str = "shapley",
        generator: torch.Generator | None = None,
        chunk_size: int = 8,
    ) -> auditing.Audit:
        """Residual (squared similarities) and skill over fresh coalitions, over all texts.

        Args:
            images: Float [B, C, H, W].
            texts: Strings, token ids [T, L], or embeddings [T, E].
            num_coalitions: Coalitions an image, in complement pairs.
            distribution: Of coalition sizes.
            generator: Source of randomness; a new one with seed 0 if None.
            chunk_size: Coalitions an image that run at a time.

        Raises:
            ArgumentError: An odd number of coalitions, a chunk below 2, or no texts.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
        """
        num_patches = self.tower.patches_of(images)
        with evaluation_mode(self.modules()):
            features = self.text_features(texts)

            def play(images: Tensor, coalitions: Tensor) -> ShapleyOutput:
                output: ShapleyOutput = self.tower(images, coalitions, paired=True)
                return ShapleyOutput(*(similarities(part, features) for part in output))

            return auditing.audit(
                play,
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
        text: Texts,
        *,
        players: Grid | None = None,
        chunk_size: int = 64,
    ) -> PatchGame:
        """The game of one image and one text, in similarities; callable on masks [n, N].

        Args:
            image: Float [C, H, W] or [1, C, H, W].
            text: One string, token ids [1, L], or an embedding [1, E].
            players: Rows and columns of a coarser grid whose cells are the players.
            chunk_size: Coalitions that run at a time.

        Raises:
            ArgumentError: Not one text, players finer than the patches, or a chunk below 1.
            ImageError: More than one image, a size that the model refuses, or bad pixels.
        """
        image = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
        grid = self.tower.grid_of(image)
        check_finite(image)
        with torch.no_grad(), evaluation_mode(self.modules()):
            features = self.text_features(text)
        if len(features) != 1:
            raise ArgumentError(f"there are {len(features)} texts; a game is played with one.")
        games = PatchGames(MatchedModel(self.tower, features), image, grid, players, chunk_size)
        return PatchGame(games, torch.zeros(1, dtype=torch.int64))

    def classifier(self, texts: Texts, class_names: Sequence[str] | None = None) -> ShapleyWrapper:
        """A zero-shot classifier: the image tower, one class a text, logits in CLIP's scale.

        It shares the tower's weights, and does all that a wrapped classifier does: metrics,
        comparisons, Shapley truth. The texts' embeddings are copied into its head.

        Args:
            texts: Strings, token ids [K, L], or embeddings [K, E], such as means over templates.
            class_names: Names of the classes; by default the strings.

        Raises:
            ArgumentError: No texts, strings without a tokenizer, or not one name a text.
        """
        self.tower._check_in_use()
        with torch.no_grad(), evaluation_mode(self.modules()):
            features = self.text_features(texts)
        scale, bias = self._scale_and_bias()
        visual: Any = self.tower.model
        weight = features * scale.detach()
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        head.weight = nn.Parameter(weight)
        if bias is not None:
            head.bias = nn.Parameter(bias.detach().to(weight).expand(len(weight)).clone())
        names = strings_of(texts) if class_names is None else class_names
        return ShapleyWrapper(
            visual, head=head, readout="cosine", class_names=names, **self._options
        )

    # --- facts --------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the size that the model was wrapped for."""
        return self.tower.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was wrapped for."""
        return self.tower.image_size

    @property
    def num_patches(self) -> int:
        """N, rows times columns."""
        return self.tower.num_patches

    def patches_of(self, images: Tensor) -> int:
        """N of these images, whose size may be another than the model was wrapped for.

        Raises:
            ImageError: A size that the backbone refuses.
        """
        return self.tower.patches_of(images)

    @property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation of the channels, where the model tells."""
        return self.tower.normalization

    def report(self) -> ImageTextReport:
        """A printable summary: how the tower is read, and how far similarities have moved."""
        return report_on_towers(self.model, self.tower)

    def unwrap(self) -> nn.Module:
        """The original model, its structure and mode as they were, its weights as trained.

        The wrapper cannot be used afterwards.
        """
        self.tower.unwrap()
        return self.model

    def train(self, mode: bool = True) -> Self:
        """This module, in train or eval mode with all that belongs to it."""
        self.tower.training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model, where the wrapper has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While unpickling there is no model yet; asking it would ask for it again.
            if name in ("model", "tower") or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def _tokens(self, text: Texts) -> Tensor:
        return tokens_of(text, self.tokenizer).to(next(self.model.parameters()).device)

    def _scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        model: Any = self.model
        return model.logit_scale.exp(), getattr(model, "logit_bias", None)


def wrap_image_text(model: nn.Module, options: Mapping[str, Any]) -> ShapleyCLIP:
    """What `ShapleyWrapper(model, **options)` is for a model of images and texts.

    Raises:
        ArgumentError: An option that is about a classifier.
    """
    about_classes = {"readout", "features", "head", "num_classes", "class_names"} & options.keys()
    given = sorted(name for name in about_classes if str(options[name]) not in ("None", "auto"))
    if given:
        raise ArgumentError(
            f"{type(model).__name__} reads images and texts, whose match needs no classifier; "
            f"{', '.join(given)} came. Leave that out, or wrap the image tower alone: "
            "ShapleyWrapper(model.visual, head=nn.Linear(embedding, classes)), or num_classes= for "
            "a new head."
        )
    return ShapleyCLIP(model, **{name: options[name] for name in options.keys() - about_classes})
