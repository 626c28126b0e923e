"""The games that a wrapped model plays on images, as functions of who is present."""

from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from shapwrap._types import Grid, Images, Logits
from shapwrap.arguments import check_at_least
from shapwrap.coalitions.checks import are_complement_pairs, check_coalitions
from shapwrap.errors import CoalitionError, CoalitionTypeError, ImageError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.values.players import patches_of, player_of_patch

Masks = TypeVar("Masks", np.ndarray, Tensor)


@runtime_checkable
class ValuedModel(Protocol):
    """A model whose coalitions have values: `ShapleyWrapper`."""

    def value(self, images: Tensor, coalitions: Tensor) -> Tensor:
        """v(s), [B, S, K]."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules, the model included."""
        ...


class PatchGames:
    """v(s) of every class of a batch of images, in logits, with the model in eval mode.

    Calling it leaves the modes of the model as they were and builds no graph.

    Args:
        model: A wrapped model.
        images: Float [B, C, H, W], normalised as the model was trained.
        grid: Rows and columns of patches for images of this size.
        players: Rows and columns of players; by default one for each patch.
        chunk_size: Masked images that run at a time.
        removal: What the model does with absent patches, for the record.

    Raises:
        ArgumentError: Players finer than the patches, or a chunk below 1.
    """

    def __init__(
        self,
        model: ValuedModel,
        images: Images,
        grid: Grid,
        players: Grid | None = None,
        chunk_size: int = 64,
        removal: str = "native masking",
    ):
        check_at_least("chunk_size", chunk_size, 1)
        self.grid = grid
        self.players = grid if players is None else players
        self.owner = player_of_patch(grid, self.players)
        self.chunk_size = chunk_size
        self.removal = removal
        self._model = model
        self._images = images.detach()

    @property
    def n_players(self) -> int:
        """Number of players of each game."""
        return self.players[0] * self.players[1]

    def __len__(self) -> int:
        """B, the number of games."""
        return len(self._images)

    def __call__(self, coalitions: Tensor) -> Tensor:
        """v(s), [B, S, K]: 0 for nobody, the logits minus the baseline for everybody.

        Args:
            coalitions: Bool [B, S, players].

        Raises:
            CoalitionTypeError: Not boolean.
            CoalitionError: Another shape.
        """
        check_coalitions(coalitions, len(self), self.n_players)
        coalitions = patches_of(coalitions, self.owner)
        step = max(1, self.chunk_size // len(self))
        if are_complement_pairs(coalitions):
            # Cut between pairs, which a token model evaluates in one pass.
            step = max(2, step // 2 * 2)
        with evaluation_mode(self._model.modules()), torch.no_grad():
            rows = [
                torch.cat([self._model.value(images, s) for s in part.split(step, dim=1)], dim=1)
                for images, part in zip(
                    self._images.split(self.chunk_size),
                    coalitions.split(self.chunk_size),
                    strict=True,
                )
            ]
        return torch.cat(rows)

    @property
    def grand_values(self) -> Logits:
        """V of everybody, [B, K]: the logits minus the baseline."""
        return self(torch.ones(len(self), 1, self.n_players, dtype=torch.bool))[:, 0]

    def select(self, rows: Tensor) -> "PatchGames":
        """The games of some of the images, int64 [b]."""
        images = self._images[rows.to(self._images.device)]
        return PatchGames(
            self._model, images, self.grid, self.players, self.chunk_size, self.removal
        )


class PatchGame:
    """v(s) of one class of one image, in logits: a function of boolean masks, True where present.

    Masks may be NumPy arrays or tensors, and the values are what the masks are, so that the
    approximators of other packages, such as shapiq's, can play it.

    Args:
        games: Of one image.
        target: The class, int64 [1].

    Raises:
        ImageError: More than one image.
    """

    normalization_value = 0.0
    """v of nobody: values are centred already."""
    empty_value = 0.0
    """v of nobody."""

    def __init__(self, games: PatchGames, target: Tensor):
        if len(games) != 1:
            raise ImageError(
                f"there are {len(games)} images; a game is played on one. Use images[:1], or "
                "shapwrap.metrics.shapley_truth for the Shapley values of a batch."
            )
        self._games = games
        self.target = int(target)
        self.grid = games.grid
        self.players = games.players
        self.n_players = games.n_players
        self.chunk_size = games.chunk_size
        self.grand_value = float(games.grand_values[0, self.target])

    def __call__(self, coalitions: Masks) -> Masks:
        """Values, one a coalition: float64 [n] for an array, [n] on its device for a tensor.

        Args:
            coalitions: Boolean [n, players], or [players] for one coalition.

        Raises:
            CoalitionTypeError: Not boolean.
            CoalitionError: Another shape, or no coalition.
        """
        # A copy: tensors cannot be made of reversed or read-only views.
        is_array = isinstance(coalitions, np.ndarray)
        masks = torch.from_numpy(coalitions.copy()) if is_array else coalitions
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            came = getattr(coalitions, "dtype", type(coalitions).__name__)
            raise CoalitionTypeError(
                f"coalitions are {came}; expected a boolean array or tensor, True where a player "
                "is present."
            )
        if masks.ndim not in (1, 2) or masks.shape[-1] != self.n_players or masks.numel() == 0:
            raise CoalitionError(
                f"coalitions have shape {tuple(masks.shape)}; expected [n >= 1, {self.n_players}], "
                f"one column for each of the {self.players[0]} x {self.players[1]} players."
            )
        values = self._games(masks.view(1, -1, self.n_players))[0, :, self.target]
        if is_array:
            return values.cpu().double().numpy()
        return values.to(coalitions.device)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"PatchGame(class {self.target}, {self.players[0]} x {self.players[1]} players, "
            f"v(everybody) = {self.grand_value:.4g})"
        )
