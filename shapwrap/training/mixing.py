"""Mixup and cutmix, with a label for every coalition of a mixed image."""

from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from timm.data.mixup import Mixup
from torch import Tensor

from shapwrap._types import Coalitions, Grid, Images
from shapwrap.errors import TrainingError
from shapwrap.masking.pixels import sums_over_patches
from shapwrap.training.config import LoopConfig
from shapwrap.training.random_stream import global_states_kept


class MixedBatch(NamedTuple):
    """Images of two each, and how much of which is seen at every pixel."""

    images: Images
    partner: Tensor
    """Index of the other image of each pair, int64 [B]; of itself for one that has none."""
    is_first: Tensor
    """Whether an image is the first of its pair, bool [B]."""
    first_pixels: Float[Tensor, "batch height width"]
    """Share of the first image of the pair at every pixel."""
    first_share: Float[Tensor, " batch"]
    """Share of the first image of the pair in the whole."""

    def targets(self, labels: Tensor, num_classes: int) -> Float[Tensor, "batch classes"]:
        """Labels of the whole images: those of the two by their shares.

        Args:
            labels: Class indices [B], or probabilities [B, K].
            num_classes: K.

        Raises:
            TrainingError: Labels that the model has no class for.
        """
        first, second = self._two_labels(labels, num_classes)
        return torch.lerp(second, first, self.first_share[:, None].to(first.dtype))

    def masked_targets(
        self,
        labels: Tensor,
        num_classes: int,
        coalitions: Coalitions,
        grid: Grid,
        covered: tuple[int, int],
    ) -> Float[Tensor, "batch coalitions classes"]:
        """Labels of the coalitions: those of the two by their shares in what can be seen.

        Args:
            labels: Class indices [B], or probabilities [B, K].
            num_classes: K.
            coalitions: True where a patch is present.
            grid: Of patches.
            covered: Height and width over which the patches lie.

        Raises:
            TrainingError: Labels that the model has no class for.
        """
        first, second = self._two_labels(labels, num_classes)
        pixels = self.first_pixels.to(first.dtype)
        seen = coalitions.to(first.dtype)
        of_first = torch.einsum("bsn,bn->bs", seen, sums_over_patches(pixels, grid, covered))
        area = sums_over_patches(torch.ones_like(pixels[:1]), grid, covered)[0]
        share = of_first / (seen @ area).clamp(min=1)
        return torch.lerp(second[:, None], first[:, None], share[..., None])

    def _two_labels(self, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        own = _probabilities(labels, num_classes)
        others = own[self.partner]
        first = self.is_first[:, None]
        return torch.where(first, own, others), torch.where(first, others, own)


class Mixing:
    """timm's mixup and cutmix of each batch with its reverse, and what they did to every pixel.

    Args:
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none; with both, one of them is drawn for each batch.
        probability: That a batch is mixed at all.
    """

    def __init__(self, mixup: float, cutmix: float, probability: float = 1.0):
        # The label that is mixed is a mark of the first image of each pair: see `__call__`.
        self._mixup = Mixup(
            mixup, cutmix, prob=probability, label_smoothing=0.0, num_classes=1, multi_label=True
        )

    @classmethod
    def of(cls, config: LoopConfig) -> Self | None:
        """What a configuration asks for; None for nothing."""
        if config.mixup == 0 and config.cutmix == 0:
            return None
        return cls(config.mixup, config.cutmix, config.mixing_probability)

    def __call__(self, images: Images, generator: torch.Generator) -> MixedBatch:
        """A mixed copy; of an odd number of images, the last one stays as it is.

        Args:
            images: Pixels.
            generator: On the CPU; timm draws from NumPy's global state, which is seeded from it
                and afterwards what it was.
        """
        batch, paired = len(images), len(images) // 2 * 2
        place = torch.arange(batch, device=images.device)
        partner = torch.where(place < paired, paired - 1 - place, place)
        is_first = place <= partner
        # A channel that is 1 in the first image of a pair is mixed like the others.
        mark = is_first[:, None, None, None].to(images.dtype).expand(-1, 1, *images.shape[-2:])
        marked = torch.cat((images, mark), dim=1)
        shares = is_first.to(images.dtype)[:, None]
        if paired:
            seed = int(torch.randint(2**32, (), generator=generator))
            with global_states_kept():
                np.random.seed(seed)  # noqa: NPY002 - timm draws from the global state
                mixed, mixed_shares = self._mixup(marked[:paired], shares[:paired])
            marked = torch.cat((mixed, marked[paired:]))
            shares = torch.cat((mixed_shares.to(shares.dtype), shares[paired:]))
        return MixedBatch(marked[:, :-1], partner, is_first, marked[:, -1], shares[:, 0])


def _probabilities(labels: Tensor, num_classes: int) -> Float[Tensor, "batch classes"]:
    if labels.ndim == 2:
        return labels
    try:
        zeros = torch.zeros(len(labels), num_classes, device=labels.device)
        return zeros.scatter_(1, labels[:, None], 1.0)
    except RuntimeError as error:
        raise TrainingError(
            f"labels do not fit the {num_classes} classes of the model ({error}); expected "
            f"0 to {num_classes - 1}. Wrap with num_classes= for another number."
        ) from error
