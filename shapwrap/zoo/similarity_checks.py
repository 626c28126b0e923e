"""What must hold for an image tower inside an image-text model."""

import torch
from torch import Tensor, nn

from shapwrap.clip import ShapleyCLIP
from shapwrap.zoo.checks import SUM_TOLERANCE, check_leak, check_sums, passed_if, relative
from shapwrap.zoo.construct import Specimen
from shapwrap.zoo.row import Row

NUM_TEXTS = 5


class ImageText(nn.Module):
    """The tower, and one random embedding for each token: texts of one token."""

    def __init__(self, visual: nn.Module, width: int, dtype: torch.dtype):
        super().__init__()
        self.visual = visual
        self.texts = nn.Embedding(NUM_TEXTS, width, dtype=dtype)
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=dtype))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings [T, E]."""
        embeddings = self.texts(text[:, 0])
        return nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


@torch.no_grad()
def check_similarities(
    row: Row, specimen: Specimen, images: Tensor, width: int, generator: torch.Generator
) -> None:
    """Efficiency, v(nobody), v(everybody) and no leak of the unit embeddings, and of similarities.

    Args:
        row: Where results are written, each check with "similarity" before its name.
        specimen: A tower, which is not wrapped now.
        images: Noise.
        width: Of the embedding.
        generator: Draws coalitions, and noise for absent patches.
    """
    with torch.random.fork_rng(devices=[]):
        model = ImageText(specimen.model, width, specimen.dtype)
        model.texts.weight.copy_(torch.randn(NUM_TEXTS, width, generator=generator))
    clip = ShapleyCLIP(model, image_size=specimen.image_size).eval()
    found = Row(row.library, row.name)
    check_sums(found, clip.tower, images)
    check_leak(found, clip.tower, images, generator)
    texts = torch.arange(NUM_TEXTS)[:, None]
    similarities = clip.encode_image(images) @ clip.text_features(texts).T
    gap = relative(clip.attribute(images, texts).sum(dim=1) - similarities, similarities)
    found.checks["of texts"] = passed_if(gap <= SUM_TOLERANCE, f"gap {gap:.2g}")
    row.checks |= {f"similarity: {name}": result for name, result in found.checks.items()}
    clip.unwrap()
