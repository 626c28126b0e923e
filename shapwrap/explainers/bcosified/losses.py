"""How far the embeddings of one tower are from those of another."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap.masking.pooling import compute_dtype

Embeddings = Float[Tensor, "batch embedding"]


def cosine_loss(student: Embeddings, teacher: Embeddings) -> Float[Tensor, ""]:
    """Mean of 1 - cos of each image's two embeddings."""
    return (1 - cosines(student, teacher).diagonal()).mean()


def siglip_loss(
    student: Embeddings, teacher: Embeddings, *, scale: float, bias: float
) -> Float[Tensor, ""]:
    """SigLIP's loss, in which the other tower's embeddings take the place of texts.

    The sum of -log sigmoid(z (scale cos + bias)) over all pairs of the batch, over its size; z is 1
    for the two embeddings of one image and -1 for those of two.

    Args:
        student: One embedding an image.
        teacher: The other tower's.
        scale: What cosines are multiplied with.
        bias: What is added.

    References:
        Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    logits = scale * cosines(student, teacher) + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)


def cosines(student: Embeddings, teacher: Embeddings) -> Float[Tensor, "batch batch"]:
    """Cosines of all pairs, in float32 at least, students in rows."""
    student = functional.normalize(student.to(compute_dtype(student)), dim=-1)
    teacher = functional.normalize(teacher.to(student.dtype), dim=-1)
    return student @ teacher.mT
