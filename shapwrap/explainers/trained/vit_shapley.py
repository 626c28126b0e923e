"""ViT-Shapley: Shapley values of a ViT's masked copy, learned by the ViT itself."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from shapwrap._types import Images
from shapwrap.errors import BackboneTypeError, UnsupportedBackboneError
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.trained.config import ViTShapleyConfig
from shapwrap.explainers.trained.surrogate import Surrogate
from shapwrap.explainers.trained.token_network import TokenNetwork
from shapwrap.explainers.trained.token_surrogate import TokenSurrogate
from shapwrap.explainers.trained.trained_explainer import TrainedExplainer


class ViTShapley(TrainedExplainer):
    """A ViT that was fine-tuned to say the Shapley values of its own patches.

    Needs training: `ViTShapley.train(model, data)`. First a surrogate, a copy of the model, learns
    to classify with patches removed; then an explainer, a copy of the surrogate with a new head,
    learns the Shapley values of the surrogate's class probabilities by weighted least squares.

    Args:
        model: A plain token model: timm, torchvision, or of such parts.
        config: Settings; `values` are in probability by default.
        chunk_size: Masked images that go through a network at a time.

    Raises:
        UnsupportedBackboneError: A function.
        BackboneTypeError: A wrapped model, or no model.

    References:
        Covert, Kim & Lee 2023, "Learning to Estimate Shapley Values with Vision Transformers".
    """

    name = "vit-shapley"
    config: ViTShapleyConfig

    def __init__(
        self, model: Model, *, config: ViTShapleyConfig | None = None, chunk_size: int = 64
    ):
        super().__init__(model, config=config or ViTShapleyConfig(), chunk_size=chunk_size)
        if self.model.wrapped is not None:
            raise BackboneTypeError(
                "model is a ShapleyWrapper, which explains itself; expected the plain ViT. Use "
                "SelfExplaining(wrapped), or pass wrapped.unwrap()."
            )
        if self.model.module is None:
            raise UnsupportedBackboneError(
                "the model is a function, whose patches cannot be removed; expected a ViT as an "
                "nn.Module. Use FastSHAP with surrogate=None."
            )

    @classmethod
    def train(
        cls,
        model: Model,
        data: Iterable[Any],
        *,
        config: ViTShapleyConfig | None = None,
        chunk_size: int = 64,
    ) -> "ViTShapley":
        """A trained explainer of the model; see `fit` for the data and the errors."""
        explainer = cls(model, config=config, chunk_size=chunk_size)
        explainer.fit(data)
        return explainer

    def make_surrogate(self, images: Images) -> Surrogate:
        """A copy of the model that removes absent patches before its first block."""
        if self.model.module is None:
            raise UnsupportedBackboneError("the model is a function; expected an nn.Module.")
        return TokenSurrogate(self.model.module, (images.shape[-2], images.shape[-1]))

    def make_network(self, surrogate: Surrogate, images: Images, num_classes: int) -> nn.Module:
        """The surrogate's blocks with a new head for each patch."""
        if not isinstance(surrogate, TokenSurrogate):
            raise BackboneTypeError(
                f"surrogate is {type(surrogate).__name__}; expected TokenSurrogate."
            )
        return TokenNetwork(
            surrogate,
            (images.shape[-2], images.shape[-1]),
            num_classes,
            mlp_ratio=self.config.mlp_ratio,
            bounded=self.config.link == "probability",
        )
