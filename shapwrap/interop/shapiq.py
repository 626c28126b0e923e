"""Explanations and games as those of shapiq: its plots, indices and approximators."""

from typing import Any

import numpy as np
import torch

from shapwrap.errors import ArgumentError, BackboneTypeError, MissingDependencyError
from shapwrap.explanation import Explanation
from shapwrap.values.patch_game import PatchGame

try:
    from shapiq import Game, InteractionValues
except ImportError as error:
    raise MissingDependencyError(
        "shapwrap.interop.shapiq needs shapiq; run: pip install 'shapwrap[shapiq]'"
    ) from error


def interaction_values(explanation: Explanation) -> list[InteractionValues]:
    """The values of each image as Shapley values (index "SV", order 1) of its patches, one object.

    Player n is patch n, row by row; the empty interaction and `baseline_value` are what the model
    says of nobody, so all values together sum to the logit (above the mean logit, with `contrast`).
    They are marked as estimated: a model says them, and `audit` tells how well.

    Raises:
        ArgumentError: An explanation by another method, whose values are not Shapley values of
            patches, or are of a game whose baseline is not known.
    """
    if explanation.total is not None:
        raise ArgumentError(
            f"the explanation is by {explanation.method!r}; expected one of a wrapped model, "
            "wrapped.explain(images), whose values share out the logit minus a baseline."
        )
    baseline = torch.as_tensor(explanation.baseline).double().cpu().expand(explanation.logits.shape)
    if explanation.contrast:
        baseline = baseline - baseline.mean(dim=1, keepdim=True)
    baselines = baseline.gather(1, explanation.target.cpu()[:, None])[:, 0]
    number = explanation.values.shape[1]
    lookup: dict[tuple[int, ...], int] = {(): 0, **{(n,): n + 1 for n in range(number)}}
    return [
        InteractionValues(
            np.concatenate([[empty], values]),
            index="SV",
            min_order=0,
            max_order=1,
            n_players=number,
            interaction_lookup=dict(lookup),
            estimated=True,
            baseline_value=empty,
        )
        for empty, values in zip(
            baselines.tolist(), explanation.values.detach().double().cpu().numpy(), strict=True
        )
    ]


class ShapiqGame(Game):
    """A game of a wrapped model as a `shapiq.Game`, which can be computed, stored and loaded.

    shapiq's approximators play `wrapped.game(image)` itself; what asks for a `Game` needs this.

    Args:
        game: `wrapped.game(image, target)`, or one of a `ShapleyCLIP`.
        baseline: What the model says of nobody, `wrapped.baseline[game.target]` where there is one.
            It is stored with the values and taken off when the game is played.

    Raises:
        BackboneTypeError: No `PatchGame`.
        MissingDependencyError: shapiq is not installed (when this module is imported).
    """

    def __init__(self, game: PatchGame, *, baseline: float = 0.0):
        if not isinstance(game, PatchGame):
            raise BackboneTypeError(
                f"game is {type(game).__name__}; expected wrapped.game(image, target)."
            )
        super().__init__(n_players=game.n_players, normalization_value=float(baseline))
        self._game = game
        self._baseline = float(baseline)

    def value_function(self, coalitions: np.ndarray) -> Any:
        """Logits with these players, float64 [n]; coalitions are [n, players] of 0 and 1."""
        return self._game(coalitions.astype(bool)) + self._baseline
