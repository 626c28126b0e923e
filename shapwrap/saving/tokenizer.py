"""The tokenizer of an image-text model, where it is one that can be made again offline."""

from typing import Any

from torch import Tensor

from shapwrap.errors import SavedModelError
from shapwrap.saving.open_clip_models import imported


class UnsavedTokenizer:
    """Stands for a tokenizer that was not saved; strings are refused, token ids are not."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, texts: list[str]) -> Tensor:
        """Never anything.

        Raises:
            SavedModelError: Always.
        """
        raise SavedModelError(
            f"texts are strings, but the tokenizer, {self.name}, was not saved with the model; "
            "pass tokenizer= to from_pretrained, or token ids instead of strings."
        )


def describe_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """As JSON; None if there is none."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, UnsavedTokenizer):
        return {"given": tokenizer.name}
    module = getattr(tokenizer, "__module__", None) or type(tokenizer).__module__
    name = f"{module}.{getattr(tokenizer, '__qualname__', type(tokenizer).__qualname__)}"
    if type(tokenizer).__name__ != "SimpleTokenizer" or not module.startswith("open_clip"):
        return {"given": name}
    options = {"context_length": tokenizer.context_length}
    # Another vocabulary or cleaning is not told by the object; two encodings tell it.
    if _marks(tokenizer) != _marks(imported().SimpleTokenizer(**options)):
        return {"given": name}
    return {"open_clip": "SimpleTokenizer", **options}


def build_tokenizer(said: dict[str, Any] | None) -> Any:
    """The tokenizer, or what stands for it.

    Raises:
        SavedModelError: An unknown one.
    """
    if said is None:
        return None
    if isinstance(said.get("given"), str):
        return UnsavedTokenizer(said["given"])
    length = said.get("context_length")
    if said.get("open_clip") != "SimpleTokenizer" or not isinstance(length, int):
        raise SavedModelError(
            f"the tokenizer is {said!r:.80}, which this version does not know; pass tokenizer=."
        )
    return imported().SimpleTokenizer(context_length=length)


def _marks(tokenizer: Any) -> tuple[Any, ...]:
    words = "A Photo of two cats,  on a couch!"
    reduction = getattr(tokenizer, "reduction_fn", None)
    return len(tokenizer.encoder), tokenizer(words).tolist(), reduction is None
