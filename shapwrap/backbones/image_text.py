"""Models of images and texts, of which one tower reads images."""

from typing import TypeGuard

from torch import Tensor, nn

from shapwrap.errors import BackboneTypeError


def reads_texts(model: object) -> TypeGuard[nn.Module]:
    """Whether this is a CLIP-like model, with an image tower and an encoder of texts."""
    towers = isinstance(getattr(model, "visual", None), nn.Module)
    texts = callable(getattr(model, "encode_text", None))
    return isinstance(model, nn.Module) and towers and texts


def has_scale(model: nn.Module) -> bool:
    """Whether the model states the logarithm of what similarities are multiplied with."""
    return isinstance(getattr(model, "logit_scale", None), Tensor)


def check_one_tower(model: nn.Module) -> None:
    """Raise unless the model reads images alone.

    Raises:
        BackboneTypeError: A CLIP-like model, with an image tower and an encoder of texts.
    """
    if reads_texts(model):
        name = type(model).__name__
        raise BackboneTypeError(
            f"{name} reads images and texts and returns embeddings of both; expected its image "
            "tower and a head. Pass the tower: ShapleyWrapper(model.visual, "
            "head=nn.Linear(embedding, classes)), or num_classes= for a new head."
        )
