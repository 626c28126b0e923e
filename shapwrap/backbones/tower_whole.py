"""Image towers whose way of reading their patches no mean describes, and what all towers state."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from shapwrap._types import Images, PreLogits
from shapwrap.backbones.base import FeatureMap, Normalization
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.whole_model import WholeModel
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.masking.batch_norm import evaluation_mode


class TowerWhole(WholeModel):
    """Any open_clip image tower: its own embedding, and its last intermediate map.

    Without a classifier, the embedding is what a new head reads.
    """

    family = "image tower, kept whole"

    model: Any

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the tower states its size and gives its embedding with intermediate maps."""
        has_intermediates = callable(getattr(model, "forward_intermediates", None))
        tower = any(hasattr(model, name) for name in ("trunk", "attnpool", "ln_post"))
        return has_intermediates and tower and size_of_tower(model) is not None

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The last intermediate map, and the embedding, from one pass."""
        with evaluation_mode(patch_dropouts(self.model)):
            found = self.model.forward_intermediates(images, indices=[-1])
        return patches_of_map(found["image_intermediates"][0]), embedding_of(
            self.model, found["image_features"]
        )

    def original(self, images: Images) -> tuple[PreLogits, Tensor]:
        """The embedding, twice."""
        embedding = embedding_of(self.model, self.model(images))
        return embedding, embedding

    def classifiers(self) -> list[nn.Module]:
        """None: the output of a tower is what a head reads."""
        return []

    def image_size(self) -> tuple[int, int]:
        """The size that the tower states."""
        return size_of_tower(self.model) or (224, 224)

    def normalization(self) -> Normalization | None:
        """The statistics that the tower states."""
        return pixel_statistics(self.model)


def embedding_of(tower: nn.Module, output: Any) -> Tensor:
    """The embedding [B, E]; some towers return their tokens with it.

    Raises:
        UnsupportedBackboneError: A vector for each token instead.
    """
    embedding = output[0] if isinstance(output, tuple) else output
    if embedding.ndim != 2:
        raise UnsupportedBackboneError(
            f"{type(tower).__name__} returned shape {tuple(embedding.shape)}; expected one "
            "embedding an image, [B, E]. Build the tower with pooling (open_clip: pool_type='tok' "
            "or 'avg')."
        )
    return embedding


def size_of_tower(tower: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels that a tower states, if it does."""
    size: Any = getattr(tower, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else None


def pixel_statistics(tower: nn.Module) -> Normalization | None:
    """Mean and standard deviation that open_clip notes on a tower when it loads weights."""
    mean: Any = getattr(tower, "image_mean", None)
    std: Any = getattr(tower, "image_std", None)
    return None if mean is None or std is None else Normalization(tuple(mean), tuple(std))


def patch_dropouts(tower: nn.Module) -> Iterable[nn.Module]:
    """Layers that drop patches in training, at random, which a grid of patches cannot survive."""
    return [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] in ("patch_dropout", "patch_drop")
    ]


register_backbone(TowerWhole, Preference.WHOLE)
