"""What ViT-Shapley and FastSHAP share: a surrogate, a network for it, one pass to explain."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from shapwrap._types import Grid, Images
from shapwrap.errors import (
    ArgumentError,
    ImageError,
    MissingDependencyError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.explainers.base import Attribution, Explainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.trained.config import TrainedConfig
from shapwrap.explainers.trained.data import first_images
from shapwrap.explainers.trained.links import linked
from shapwrap.explainers.trained.objectives import additive_efficient
from shapwrap.explainers.trained.surrogate import Surrogate, precision_of
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.training.config import LoopConfig
from shapwrap.training.random_stream import global_states_kept

SHAPE = "image_shape"
CLASSES = "num_classes"


class TrainedExplainer(Explainer):
    """A method whose explanation is one pass of a network that was trained for one model.

    Values add up to v(1) - v(0) of the surrogate, in the unit of the link; the explained model is
    copied, never changed.

    Args:
        model: Normalised images to logits.
        config: Settings of the training and of the game.
        grid: Rows and columns of patches; by default those of the backbone.
        chunk_size: Masked images that go through a network at a time.
    """

    def __init__(
        self,
        model: Model,
        *,
        config: TrainedConfig,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        self.config = config
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Records of the two stages, "surrogate" and "explainer", as the Trainer keeps them."""
        self._surrogate: Surrogate | None = None
        self._network: nn.Module | None = None
        self._shape: tuple[int, int, int] | None = None
        self._num_classes = 0

    # --- what a method says -------------------------------------------------------------------

    @abstractmethod
    def make_surrogate(self, images: Images) -> Surrogate:
        """An untrained surrogate for such images."""

    @abstractmethod
    def make_network(self, surrogate: Surrogate, images: Images, num_classes: int) -> nn.Module:
        """An untrained explainer network, drawn from torch's random state."""

    # --- training -----------------------------------------------------------------------------

    def fit(self, data: Iterable[Any], *, resume: bool = False) -> "TrainedExplainer":
        """The explainer itself, after both stages of training.

        Args:
            data: Batches of normalised images, or of (images, labels), of one size; labels are not
                used. It is iterated once an epoch, by both stages.
            resume: Go on from the newest checkpoints in the stages' `output_dir`; stages without
                one start anew.

        Raises:
            MissingDependencyError: accelerate is not installed.
            TrainingError: Data that cannot be used, or a loss that is not finite.
            ImageError: Images of several sizes, or that the model refuses.
            UnsupportedBackboneError: The model has no surrogate of this kind.
        """
        try:
            from shapwrap.explainers.trained.stages import ExplainerStage
        except ImportError as error:
            raise MissingDependencyError(
                f"training needs accelerate and tqdm ({error}); pip install 'shapwrap[train]'."
            ) from error
        images = self._like_model(first_images(data)[:1])
        # A caller may have switched gradients off.
        with self.model.evaluated(), torch.enable_grad():
            num_classes = self._classes_of(images)
            surrogate = self._drawn(lambda: self.make_surrogate(images))
            history = {"surrogate": self._fit_surrogate(surrogate, data, images, resume)}
            surrogate.to(images.device)
            network = self._drawn(lambda: self.make_network(surrogate, images, num_classes))
            surrogate.requires_grad_(False)
            stage = ExplainerStage(
                network,
                surrogate,
                data,
                images.to(precision_of(network)),
                config=self.config,
                chunk_size=self.chunk_size,
            )
            history["explainer"] = stage.fit(resume=resume and _has_started(self.config.explainer))
        self.history = history
        self._keep(surrogate, network, images, num_classes)
        return self

    def _fit_surrogate(
        self, surrogate: Surrogate, data: Iterable[Any], images: Images, resume: bool
    ) -> list[dict[str, Any]]:
        from shapwrap.explainers.trained.stages import SurrogateStage

        settings = self.config.surrogate
        if settings is None:
            return []
        if not isinstance(surrogate.model, nn.Module):
            raise UnsupportedBackboneError(
                "the model is a function, of which no copy can be trained; expected an nn.Module, "
                "or surrogate=None in the configuration, to ask the function itself."
            )
        like = images.to(precision_of(surrogate))
        stage = SurrogateStage(
            surrogate, self._original, data, like, config=self.config, stage=settings
        )
        try:
            self._teacher = self._on(stage.accelerator.device, images)
            return stage.fit(resume=resume and _has_started(settings))
        finally:
            self._teacher = None

    _teacher: nn.Module | None = None

    def _on(self, device: torch.device, images: Images) -> nn.Module | None:
        """A copy of the model on another device; the model itself is never moved."""
        module = self.model.module
        if module is None or images.device == device:
            return None
        return deepcopy(module).to(device)

    def _original(self, images: Images) -> Tensor:
        if self._teacher is not None:
            return self._teacher(images.to(precision_of(self._teacher)))
        module = self.model.module
        return self.model.logits(images if module is None else images.to(precision_of(module)))

    # --- explaining ---------------------------------------------------------------------------

    def attribute(self, images: Images, target: Int[Tensor, " batch"]) -> Attribution:
        """One pass of the network, and one of the surrogate for v(0) and v(1).

        Raises:
            TrainingError: Nothing was trained or loaded.
            ImageError: Images of another shape than in training.
        """
        surrogate, network = self._trained()
        if tuple(images.shape[1:]) != self._shape:
            raise ImageError(
                f"images have shape {tuple(images.shape)}; this explainer was trained on images "
                f"of {self._shape} each. Resize them, or train again."
            )
        surrogate.to(images.device)
        network.to(images.device)
        images = images.to(precision_of(network))
        with torch.no_grad(), evaluation_mode(network.modules()):
            raw = torch.cat([network(some) for some in images.split(self.chunk_size)])
            ends = surrogate.ends(images, chunk_size=self.chunk_size)
        empty, full = (linked(logits, self.config.link) for logits in ends)
        gain = full - empty
        phi = additive_efficient(raw.to(gain.dtype), gain)
        columns = target[:, None, None].expand(-1, phi.shape[1], 1)
        return Attribution(
            values=phi.gather(2, columns)[:, :, 0],
            grid=surrogate.grid,
            total=gain.gather(1, target[:, None])[:, 0],
        )

    @property
    def surrogate(self) -> Surrogate:
        """The trained surrogate: images and coalitions to logits [B, S, K].

        Raises:
            TrainingError: Nothing was trained or loaded.
        """
        return self._trained()[0]

    # --- what is kept -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that was trained, as tensors, and the shape of the images.

        Raises:
            TrainingError: Nothing was trained or loaded.
        """
        surrogate, network = self._trained()
        state = {f"surrogate.{name}": tensor for name, tensor in surrogate.state_dict().items()}
        state |= {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        state[SHAPE] = torch.tensor(self._shape)
        state[CLASSES] = torch.tensor(self._num_classes)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> "TrainedExplainer":
        """The explainer itself, as it was when `state` was taken; same model and settings.

        Raises:
            ArgumentError: The state is of another model, method or configuration.
        """
        if SHAPE not in state or CLASSES not in state:
            raise ArgumentError(
                f"the state has no {SHAPE!r} and {CLASSES!r}; expected what state_dict() returns."
            )
        channels, height, width = (int(side) for side in state[SHAPE].tolist())
        num_classes = int(state[CLASSES])
        parameters = () if self.model.module is None else self.model.module.parameters()
        like = next((p for p in parameters if p.is_floating_point()), torch.zeros(()))
        images = torch.zeros(1, channels, height, width, dtype=like.dtype, device=like.device)
        with self.model.evaluated(), torch.enable_grad():
            surrogate = self._drawn(lambda: self.make_surrogate(images))
            network = self._drawn(lambda: self.make_network(surrogate, images, num_classes))
        for name, part in (("surrogate.", surrogate), ("network.", network)):
            theirs = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
            try:
                part.load_state_dict(theirs)
            except RuntimeError as error:
                raise ArgumentError(
                    f"the state does not fit this {self.name} explainer ({error}); expected one of "
                    "the same model and configuration."
                ) from error
        self._keep(surrogate, network, images, num_classes)
        return self

    def _keep(
        self, surrogate: Surrogate, network: nn.Module, images: Images, num_classes: int
    ) -> None:
        channels, height, width = images.shape[1:]
        self._surrogate = surrogate.to(images.device).eval().requires_grad_(False)
        self._network = network.to(images.device).eval().requires_grad_(False)
        self._shape = (channels, height, width)
        self._num_classes = num_classes

    def _trained(self) -> tuple[Surrogate, nn.Module]:
        if self._surrogate is None or self._network is None:
            raise TrainingError(
                f"this {self.name} explainer is not trained; call fit(data), "
                f"{type(self).__name__}.train(model, data), or load_state_dict(state)."
            )
        return self._surrogate, self._network

    def _drawn(self, make: Any) -> Any:
        """What `make` makes, from the seed of the configuration; global states stay."""
        with global_states_kept():
            torch.manual_seed(self.config.explainer.seed)
            return make()

    def _like_model(self, images: Tensor) -> Images:
        """Checked images where the model lies, in its precision."""
        parameters = () if self.model.module is None else self.model.module.parameters()
        like = next((p for p in parameters if p.is_floating_point()), images)
        if images.is_floating_point():
            images = images.to(like)
        self.model.check(images)
        return images

    @torch.no_grad()
    def _classes_of(self, images: Images) -> int:
        return self.model.logits(images).shape[1]


def _has_started(stage: LoopConfig) -> bool:
    from shapwrap.training.checkpoint import checkpoints

    return stage.output_dir is not None and bool(checkpoints(Path(stage.output_dir)))
