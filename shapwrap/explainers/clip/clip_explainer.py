"""Base of the methods that exist for image-text models alone."""

from shapwrap._types import Grid
from shapwrap.clip.zero_shot import ZeroShotClassifier
from shapwrap.errors import BackboneTypeError
from shapwrap.explainers.token_explainer import TokenExplainer


class CLIPExplainer(TokenExplainer):
    """A method that needs embeddings of image and text.

    Args:
        model: A plain image-text model with its texts.
        grid: Rows and columns of patches; by default those of the tower.
        chunk_size: Images that go through the model at a time, copies included.

    Raises:
        ArgumentError: A chunk size below 1, or a grid that is none.
        BackboneTypeError: No `ZeroShotClassifier`.
    """

    def __init__(
        self, model: ZeroShotClassifier, *, grid: Grid | None = None, chunk_size: int = 64
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        if self.model.zero_shot is None:
            raise BackboneTypeError(
                f"model is {type(self.model.model).__name__}; {self.name} compares embeddings of "
                "images and texts. Pass ZeroShotClassifier(model, texts)."
            )
        self.classifier = self.model.zero_shot
