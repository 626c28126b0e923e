"""timm models with several maps, several heads, or a class token that only the head reads."""

from typing import Any

from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.backbones.base import FeatureMap
from shapwrap.backbones.classifiers import comes_last, is_linear
from shapwrap.backbones.layout import patches_of_map
from shapwrap.backbones.registry import Preference, register_backbone
from shapwrap.backbones.timm_family import TimmFamily
from shapwrap.backbones.whole_model import WholeModel, mean_output


class TimmWhole(WholeModel, TimmFamily):
    """Any timm model: its own head on its own features, and its last intermediate map.

    Of several maps it is the last that `forward_intermediates` lists: the deepest stage, or the
    branch with the largest patches.
    """

    family = "timm, head kept whole"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether the model has timm's public methods, `forward_intermediates` among them."""
        return super().recognises(model) and hasattr(model, "forward_intermediates")

    def prepare(self, images: Images) -> None:
        """Finds out whether one linear classifier makes the logits, so that `head` can replace it.

        Without any classifier, the model's output is what a new head reads.
        """
        super().prepare(images)
        classifiers = self.classifiers()
        self.gives_logits = bool(classifiers)
        if len(classifiers) == 1 and is_linear(classifiers[0]):
            _, output = self.original(images)
            self.gives_logits = not comes_last(classifiers[0], self.model, images, output)

    def map_and_output(self, images: Images) -> tuple[FeatureMap, Tensor]:
        """The last intermediate map, and what `forward_head` makes of the final features."""
        trunk: Any = self.trunk
        final, maps = trunk.forward_intermediates(images, indices=[-1], norm=True)
        if self.classifiers() and not self.gives_logits:
            return patches_of_map(maps[0]), self.head_before_classifier(final)
        output = mean_output(trunk.forward_head(final)).flatten(1)
        return patches_of_map(maps[0]), self.project(output)

    def classifier_dropout(self) -> float:
        """None: the model's own head applies it."""
        return 0.0


register_backbone(TimmWhole, Preference.WHOLE)
