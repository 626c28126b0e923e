"""Base of the methods that exist for image-text models alone."""

from shapwrap._types import Grid, Images
from shapwrap.errors import BackboneTypeError
from shapwrap.explainers.clip.patch_embeddings import TokenEmbeddings, token_embeddings
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.token_explainer import TokenExplainer, TokenLayout


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

    def __init__(self, model: Model, *, grid: Grid | None = None, chunk_size: int = 64):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        if self.model.zero_shot is None:
            raise BackboneTypeError(
                f"model is {type(self.model.model).__name__}; {self.name} compares embeddings of "
                "images and texts. Pass ZeroShotClassifier(model, texts)."
            )
        self.classifier = self.model.zero_shot
        self._embeddings: dict[tuple[int, int], TokenEmbeddings] = {}

    def token_embeddings(self, images: Images, layout: TokenLayout) -> TokenEmbeddings:
        """How the tower embeds single tokens of images of this size; found once.

        Raises:
            UnsupportedBackboneError: It does not embed single tokens.
        """
        size = (images.shape[-2], images.shape[-1])
        if size not in self._embeddings:
            self._embeddings[size] = token_embeddings(self.model, self.classifier, images, layout)
        return self._embeddings[size]
