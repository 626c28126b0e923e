"""Texts as a user has them: strings, token ids, or embeddings."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap.errors import ArgumentError
from shapwrap.masking.pooling import compute_dtype

Texts = str | Sequence[str] | Tensor
"""Strings, token ids int [T, L], or embeddings float [T, E] of which the direction counts."""

Tokenizer = Callable[[list[str]], Tensor]


def text_embeddings(
    texts: Texts,
    encode: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer | None,
    width: int,
    device: torch.device,
) -> Float[Tensor, "texts embedding"]:
    """Unit embeddings, one a text, in at least float32.

    Args:
        texts: See `Texts`.
        encode: From token ids to embeddings.
        tokenizer: From strings to token ids.
        width: E.
        device: Where the model lies.

    Raises:
        ArgumentError: What `tokens_of` says, or embeddings of another width, not finite, or zero.
    """
    if isinstance(texts, Tensor) and texts.is_floating_point():
        if texts.ndim != 2 or texts.shape[1] != width or not len(texts):
            raise ArgumentError(
                f"texts are embeddings of shape {tuple(texts.shape)}; expected [T >= 1, {width}], "
                "one embedding a text, as encode_text returns them."
            )
        if not bool(texts.isfinite().all()):
            raise ArgumentError("texts are embeddings with NaN or infinity; expected finite ones.")
        if not bool(texts.any(dim=1).all()):
            raise ArgumentError(
                "texts are embeddings of which one is all zero, which has no direction; expected "
                "what encode_text returns."
            )
        embeddings = texts.to(device)
    else:
        embeddings = encode(tokens_of(texts, tokenizer).to(device))
    return functional.normalize(embeddings.to(compute_dtype(embeddings)), dim=-1)


def tokens_of(texts: Texts, tokenizer: Tokenizer | None) -> Tensor:
    """Token ids [T, L].

    Raises:
        ArgumentError: Neither strings nor token ids, no text, strings without a tokenizer, or one
            that does not return token ids.
    """
    if isinstance(texts, Tensor):
        if texts.dtype not in (torch.int64, torch.int32) or texts.ndim != 2:
            raise ArgumentError(
                f"texts are {texts.dtype} of shape {tuple(texts.shape)}; expected token ids, "
                "int64 [T, L], as the tokenizer of the model returns them."
            )
        if not len(texts):
            raise ArgumentError("there is no text; expected at least one.")
        return texts
    strings = strings_of(texts)
    if strings is None:
        raise ArgumentError(
            f"texts are {type(texts).__name__}; expected strings, token ids int64 [T, L], or "
            "embeddings float [T, E]."
        )
    if not strings:
        raise ArgumentError("there is no text; expected at least one.")
    if tokenizer is None:
        raise ArgumentError(
            "texts are strings, but there is no tokenizer. Pass one with the model: "
            "tokenizer=open_clip.get_tokenizer(name), or pass token ids."
        )
    ids = tokenizer(strings) if callable(tokenizer) else tokenizer
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(strings):
        came = tuple(ids.shape) if isinstance(ids, Tensor) else f"{type(ids).__name__} {ids!r:.60}"
        raise ArgumentError(
            f"the tokenizer gives {came} for {len(strings)} strings; expected a function from a "
            "list of strings to token ids, int64 [T, L], such as open_clip.get_tokenizer(name)."
        )
    return ids


def strings_of(texts: object) -> list[str] | None:
    """The strings, where texts are strings."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
        return [str(text) for text in texts]
    return None
