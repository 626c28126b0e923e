"""FastSHAP: Shapley values of cells of pixels, learned by a U-Net."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from shapwrap._types import Grid, Images
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.trained.config import FastSHAPConfig
from shapwrap.explainers.trained.pixel_surrogate import PixelSurrogate
from shapwrap.explainers.trained.surrogate import Surrogate, precision_of
from shapwrap.explainers.trained.trained_explainer import TrainedExplainer
from shapwrap.explainers.trained.unet import UNet
from shapwrap.masking.pooling import compute_dtype


class FastSHAP(TrainedExplainer):
    """A U-Net that was trained to say the Shapley values of a model's masked copy.

    Needs training: `FastSHAP.train(model, data)`. First a surrogate, a copy of the model, learns to
    classify images with cells set to zero, the mean colour; then a U-Net learns the Shapley values
    of the surrogate's log-probabilities by weighted least squares.

    Args:
        model: Any model of images, or a function of them if `config.surrogate` is None.
        config: Settings; `values` are in log-probability by default.
        grid: Rows and columns of cells; by default the patches of the backbone.
        chunk_size: Masked images that go through a network at a time.

    References:
        Jethani, Sudarshan, Covert, Lee & Ranganath 2022, "FastSHAP: Real-Time Shapley Value
        Estimation". Not the package of that name on PyPI.
    """

    name = "fastshap"
    config: FastSHAPConfig

    def __init__(
        self,
        model: Model,
        *,
        config: FastSHAPConfig | None = None,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, config=config or FastSHAPConfig(), grid=grid, chunk_size=chunk_size)

    @classmethod
    def train(
        cls,
        model: Model,
        data: Iterable[Any],
        *,
        config: FastSHAPConfig | None = None,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ) -> "FastSHAP":
        """A trained explainer of the model; see `fit` for the data and the errors."""
        explainer = cls(model, config=config, grid=grid, chunk_size=chunk_size)
        explainer.fit(data)
        return explainer

    def make_surrogate(self, images: Images) -> Surrogate:
        """A copy of the model that sees zeros where cells are absent."""
        return PixelSurrogate(
            self.model.model,
            self.model.grid_of(images),
            channels=images.shape[1],
            covered=self.model.covered(images),
            mask_channel=self.config.mask_channel,
        )

    def make_network(self, surrogate: Surrogate, images: Images, num_classes: int) -> nn.Module:
        """A U-Net for the surrogate's grid."""
        channels, height, width = images.shape[1:]
        network = UNet(
            channels, num_classes, (height, width), surrogate.grid, width=self.config.width
        )
        precision = precision_of(surrogate, compute_dtype(images))
        return network.to(images.device, precision)
