"""What of an image-text model a B-cosified explainer reads: its image tower and its texts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap.backbones.image_text import reads_texts
from shapwrap.clip.texts import Texts, Tokenizer, text_embeddings
from shapwrap.clip.zero_shot import ZeroShotClassifier
from shapwrap.errors import ArgumentError, BackboneTypeError
from shapwrap.explainers.explained_model import Model
from shapwrap.masking.batch_norm import evaluation_mode


def tower_of(model: Model) -> nn.Module:
    """The image tower of a model of images and texts, or the model itself.

    Raises:
        BackboneTypeError: No module.
    """
    if not isinstance(model, nn.Module):
        raise BackboneTypeError(
            f"model is {model!r}; expected an open_clip model with a ModifiedResNet, or that tower."
        )
    if isinstance(model, ZeroShotClassifier):
        return model.tower
    visual: Any = model.visual if reads_texts(model) else model
    return visual


def embeddings_of(
    model: Model, texts: Texts, tokenizer: Tokenizer | None, width: int
) -> Float[Tensor, "texts embedding"]:
    """Unit embeddings of texts, one a text.

    Args:
        model: Encodes strings and token ids, where it can; left in its mode.
        texts: See `Texts`.
        tokenizer: From strings to token ids.
        width: Of embeddings.

    Raises:
        ArgumentError: Strings or token ids for a tower alone, or what `text_embeddings` says.
    """
    given: Any = model.model if isinstance(model, ZeroShotClassifier) else model
    encode: Any = given.encode_text if reads_texts(given) else _no_encoder
    device = next(given.parameters()).device
    with torch.no_grad(), evaluation_mode(list(given.modules())):
        return text_embeddings(texts, encode, tokenizer, width, device)


def _no_encoder(tokens: Tensor) -> Tensor:
    raise ArgumentError(
        f"texts are {len(tokens)} strings or rows of token ids, and the model is an image tower "
        "alone; expected embeddings float [T, E]. Pass model.encode_text(...), or the whole model."
    )
