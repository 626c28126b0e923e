"""What a person should know about a wrapped image-text model before using it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shapwrap.backbones.stride_one import native_strides
from shapwrap.backbones.tower_whole import embedding_of
from shapwrap.probing import random_images, undisturbed
from shapwrap.report import Report, count_parameters
from shapwrap.wrapper import ShapleyWrapper


@dataclass(frozen=True)
class ImageTextReport:
    """Summary of a wrapped image-text model; print it."""

    model: str
    """Class of the model."""
    tower: Report
    """The image tower, whose classes are the dimensions of the embedding."""
    text_params: int
    """Parameters of everything but the image tower."""
    similarity_difference: float
    """Largest |wrapped - original| similarity that any text could show, on two images of noise:
    the length of the difference between the two embeddings."""
    direction_cosine: float
    """Cosine between the wrapped and the original image embedding, the mean of these images."""
    length: float
    """Length of the wrapped embedding, the mean of these images: 1 where all patches say the
    same, 0 where they cancel out."""

    def __str__(self) -> str:
        """The summary as aligned lines."""
        rows = {
            "model": self.model,
            "text side": f"{self.text_params / 1e6:.2f} M parameters, unchanged",
            "similarity": f"of noise, any text: at most {self.similarity_difference:.2g} off the "
            f"pretrained one (cosine of the embeddings {self.direction_cosine:.3f}, length "
            f"{self.length:.3f} instead of 1)",
        }
        tower = str(self.tower).splitlines()
        width = tower[0].index(tower[0].split("  ", 1)[1].strip())
        lines = [f"{name:<{width - 2}}  {text}" for name, text in rows.items()]
        return "\n".join([*lines, *tower])


def report_on_towers(model: nn.Module, tower: ShapleyWrapper) -> ImageTextReport:
    """The report of a wrapped image-text model, measured on two images of noise.

    Args:
        model: The image-text model.
        tower: Its wrapped image tower.
    """
    visual, wrapping = tower.model, tower._wrapping
    images = random_images(wrapping.backbone, tower.image_size, batch=2)
    with undisturbed(model):
        with native_strides(wrapping.stride_changes):
            embedding = embedding_of(visual, visual(images))
        original = functional.normalize(embedding.float(), dim=-1)
        wrapped: Tensor = tower(images)
    wrapped = wrapped.float()
    return ImageTextReport(
        model=type(model).__name__,
        tower=tower.report(),
        text_params=count_parameters(model) - count_parameters(visual),
        similarity_difference=float(torch.linalg.vector_norm(wrapped - original, dim=-1).max()),
        direction_cosine=float(functional.cosine_similarity(wrapped, original, dim=-1).mean()),
        length=float(torch.linalg.vector_norm(wrapped, dim=-1).mean()),
    )
