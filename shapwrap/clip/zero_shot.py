"""An image-text model and a list of texts, as a classifier of images."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Logits
from shapwrap.backbones.image_text import has_scale, reads_texts
from shapwrap.backbones.tower_whole import embedding_of
from shapwrap.clip.output import Embeddings, similarities
from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.clip.texts import Texts, Tokenizer, strings_of, text_embeddings
from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.masking.pooling import compute_dtype


class ZeroShotClassifier(nn.Module):
    """A plain image-text model whose classes are texts: what compared methods explain of it.

    Logits are those of the model itself: the cosine of the image's embedding and each text's,
    times exp(logit_scale), plus the bias where there is one. The pair of an image and a text is
    explained as the class of that text. The model is used, not copied: weights are shared, modes
    stay. Texts are encoded once, when this is made.

    Args:
        model: An open_clip model, or one built like it: `visual`, `encode_image`, `encode_text`,
            `logit_scale`.
        texts: Strings, token ids int [T, L], or embeddings float [T, E], such as means over
            templates, of which the direction counts.
        tokenizer: From strings to token ids, such as `open_clip.get_tokenizer(name)`.
        class_names: One a text; by default the strings.

    Raises:
        BackboneTypeError: No model of images and texts, or a wrapped one.
        ArgumentError: No texts, strings without a tokenizer, embeddings that are not finite, or
            not one name a text.
    """

    text_embeddings: Tensor

    def __init__(
        self,
        model: nn.Module,
        texts: Texts,
        *,
        tokenizer: Tokenizer | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        if isinstance(model, ShapleyCLIP):
            raise BackboneTypeError(
                "model is a ShapleyCLIP; its own classifier is model.classifier(texts). For the "
                "plain model that it wraps, pass model.model."
            )
        encodes_images = callable(getattr(model, "encode_image", None))
        if not reads_texts(model) or not encodes_images or not has_scale(model):
            raise BackboneTypeError(
                f"model is {type(model).__name__}; expected an image-text model with `visual`, "
                "`encode_image`, `encode_text` and a tensor `logit_scale`, such as "
                "open_clip.create_model(name)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.register_buffer("text_embeddings", self.encode_texts(texts))
        names = strings_of(texts) if class_names is None else list(class_names)
        if names is not None and len(names) != len(self.text_embeddings):
            raise ArgumentError(
                f"there are {len(names)} class names for {len(self.text_embeddings)} texts; "
                "expected one a text."
            )
        self.class_names = names
        self.training = model.training

    @property
    def tower(self) -> nn.Module:
        """The model's image tower."""
        visual: Any = self.model.visual
        return visual

    @property
    def num_classes(self) -> int:
        """T, the number of texts."""
        return len(self.text_embeddings)

    def forward(self, images: Tensor) -> Logits:
        """Logits [B, T], in at least float32; gradients flow.

        Raises:
            ArgumentError: Texts of another width than the images' embeddings.
        """
        model: Any = self.model
        cosines = self.cosines(images)
        logits = cosines * model.logit_scale.exp().to(cosines.dtype)
        bias = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias.to(cosines.dtype)

    def cosines(self, images: Tensor) -> Float[Tensor, "batch texts"]:
        """Cosine of each image with each text, [B, T].

        Raises:
            ArgumentError: Texts of another width than the images' embeddings.
        """
        embeddings, texts = self.image_embeddings(images), self.text_embeddings
        if embeddings.shape[1] != texts.shape[1]:
            raise ArgumentError(
                f"texts are embeddings of width {texts.shape[1]}; images have {embeddings.shape[1]}"
                ". Encode both with one model."
            )
        return similarities(embeddings, texts)

    def image_embeddings(self, images: Tensor) -> Embeddings:
        """The model's own image embeddings of unit length, [B, E]."""
        model: Any = self.model
        embeddings = embedding_of(self.tower, model.encode_image(images))
        return functional.normalize(embeddings.to(compute_dtype(embeddings)), dim=-1)

    def encode_texts(self, texts: Texts) -> Embeddings:
        """Unit embeddings [T, E] of texts in any form, in at least float32, without gradient.

        Raises:
            ArgumentError: No texts, strings without a tokenizer, or embeddings that are not finite.
        """
        model: Any = self.model
        width = texts.shape[-1] if isinstance(texts, Tensor) and texts.ndim == 2 else -1
        device = next(model.parameters()).device
        with torch.no_grad(), evaluation_mode(model.modules()):
            encoded = text_embeddings(texts, model.encode_text, self.tokenizer, width, device)
        return encoded.detach().clone()
