"""Estimators against the definition of the Shapley value, by enumeration and by shapiq."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shapwrap.errors import ArgumentError, EstimationError
from shapwrap.estimators import (
    ConvergenceWarning,
    enumerate_coalitions,
    kernel_shap,
    permutation_sampling,
)
from shapwrap.estimators.kernel_shap import expected_matrix
from tests.games import NarrowingGame, TableGame, shapley_by_definition

SAMPLERS = {
    "paired": lambda *a, **k: kernel_shap(*a, **k),
    "single": lambda *a, **k: kernel_shap(*a, paired=False, **k),
    "exact matrix": lambda *a, **k: kernel_shap(*a, exact_matrix=True, **k),
    "orders": lambda *a, **k: permutation_sampling(*a, **k),
}


def _seed(number):
    return torch.Generator().manual_seed(number)


@given(st.integers(1, 3), st.integers(1, 7), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_enumeration_is_the_definition(batch, num_patches, classes, seed):
    game = TableGame(batch, num_patches, classes, seed, smooth=False)
    made = enumerate_coalitions(game, batch, num_patches, batch_size=6)
    torch.testing.assert_close(made.values, game.shapley(), atol=1e-12, rtol=1e-12)
    assert game.asked == batch * (2**num_patches + 2)
    assert made.efficiency_gap().max() < 1e-12
    assert made.converged.all()
    assert (made.num_coalitions == 2**num_patches).all()


def test_enumeration_with_shapiq():
    import shapiq

    game = TableGame(1, 8, None, 3, smooth=False)
    exact = shapiq.ExactComputer(lambda m: game(torch.from_numpy(m)[None])[0].numpy(), 8)("SV", 1)
    found = enumerate_coalitions(game, 1, 8).values[0]
    np.testing.assert_allclose(found, [exact[(i,)] for i in range(8)], atol=1e-10)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("shape", [(2, 6, 3), (1, 9, None), (3, 2, 2)])
def test_sampling_comes_within_its_standard_errors(sampler, shape):
    game = TableGame(*shape, seed=5)
    made = sampler(game, shape[0], shape[1], threshold=None, max_coalitions=12_000)
    assert made.values.dtype == torch.float64
    difference = (made.values - game.shapley()).abs()
    errors = made.standard_errors
    assert (difference <= 5 * errors + 1e-9).all()
    assert errors.max() < 0.2
    assert made.efficiency_gap().max() < 1e-10
    assert not made.converged.any()


def test_standard_errors_are_the_spread_over_seeds():
    game = TableGame(1, 6, 2, seed=1)
    for sampler in (SAMPLERS["paired"], SAMPLERS["orders"]):
        made = [
            sampler(game, 1, 6, threshold=None, max_coalitions=2560, generator=_seed(seed))
            for seed in range(40)
        ]
        spread = torch.cat([m.values - game.shapley() for m in made]).square().mean().sqrt()
        claimed = torch.cat([m.standard_errors for m in made]).square().mean().sqrt()
        assert 0.8 < claimed / spread < 1.25


@pytest.mark.parametrize("paired", [True, False])
def test_regression_on_the_very_coalitions_that_were_drawn(paired):
    """By hand, with NumPy, from everything the game was asked."""
    seen = []
    game = TableGame(1, 5, 2, seed=2)

    def listening(coalitions):
        seen.append(coalitions[0])
        return game(coalitions)

    made = kernel_shap(
        listening, 1, 5, threshold=None, max_coalitions=120, batch_size=50, paired=paired
    )
    design = torch.cat(seen[1:]).double()
    assert len(design) == 120
    assert (made.num_coalitions == 120).all()
    if paired:
        assert torch.equal(design[0::2], 1 - design[1::2])
    values = game(design.bool()[None])[0].numpy()
    empty, grand = game.table[0, 0].numpy(), game.table[0, -1].numpy()
    a = np.zeros((5, 5))
    b = np.zeros((5, 2))
    for s, v in zip(design.numpy(), values, strict=True):
        a += np.outer(s, s) / 120
        b += np.outer(s, v - empty) / 120
    inverse, ones = np.linalg.inv(a), np.ones(5)
    for k in range(2):
        gap = (ones @ inverse @ b[:, k] - (grand - empty)[k]) / (ones @ inverse @ ones)
        expected = inverse @ b[:, k] - inverse @ ones * gap
        np.testing.assert_allclose(made.values[0, :, k].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("num", [2, 3, 5, 8])
def test_expected_matrix_is_the_mean_over_the_kernel(num):
    matrix, mass = np.zeros((num, num)), 0.0
    for bits in itertools.product([0, 1], repeat=num):
        size = sum(bits)
        if 0 < size < num:
            weight = (num - 1) / (math.comb(num, size) * size * (num - size))
            matrix += weight * np.outer(bits, bits)
            mass += weight
    np.testing.assert_allclose(expected_matrix(num).numpy(), matrix / mass, atol=1e-12)


def test_permutations_by_hand():
    """Forward and backward marginal gains of the orders that were drawn."""
    asked = []
    game = TableGame(1, 4, None, seed=4, smooth=False)

    def listening(coalitions):
        asked.append(coalitions[0])
        return game(coalitions)

    made = permutation_sampling(listening, 1, 4, threshold=None, max_coalitions=40, batch_size=12)
    drawn = torch.cat(asked[1:])
    assert len(drawn) == 36
    assert torch.equal(drawn[0::2], ~drawn[1::2])
    gains = np.zeros((6, 4))
    value = game.table[0].numpy()
    for order, masks in enumerate(drawn[0::2].numpy().reshape(6, 3, 4)):
        prefixes = [np.zeros(4, bool), *masks, np.ones(4, bool)]
        joins = [int(np.flatnonzero(b ^ a)[0]) for a, b in itertools.pairwise(prefixes)]
        for sequence in (joins, joins[::-1]):
            row = 0
            for player in sequence:
                gains[order, player] += (value[row | 1 << player] - value[row]) / 2
                row |= 1 << player
    np.testing.assert_allclose(made.values[0].numpy(), gains.mean(0), atol=1e-12)
    np.testing.assert_allclose(
        made.standard_errors[0].numpy(), gains.std(0, ddof=1) / math.sqrt(6), atol=1e-12
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_smaller_thresholds_take_more_and_come_closer(name):
    # The exact matrix has a far larger variance.
    thresholds, sampler = (0.2, 0.02, 0.002), SAMPLERS[name]
    thresholds = (0.2, 0.05, 0.02) if name == "exact matrix" else thresholds
    game = TableGame(2, 5, 2, seed=6)
    errors, numbers = [], []
    for threshold in thresholds:
        made = sampler(game, 2, 5, threshold=threshold, max_coalitions=10**6)
        assert made.converged.all()
        assert (made.ratio < threshold).all()
        ratio = made.standard_errors.amax(1) / (made.values.amax(1) - made.values.amin(1))
        torch.testing.assert_close(made.ratio, ratio.amax(1))
        errors.append(float((made.values - game.shapley()).square().mean()))
        numbers.append(int(made.num_coalitions.sum()))
    assert numbers[0] <= numbers[1] < numbers[2]
    assert errors[2] < errors[0]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("kind", [TableGame, NarrowingGame])
def test_a_batch_is_its_games_one_by_one(sampler, kind):
    """Also where games stop at different times, and whether or not they can be left out."""
    game = kind(3, 6, 2, seed=8)
    game.table[1] = game.table[1] + torch.randn(64, 2, dtype=torch.float64, generator=_seed(0))
    together = sampler(game, 3, 6, threshold=0.02, max_coalitions=10**6, generator=_seed(3))
    assert len(set(together.num_coalitions.tolist())) > 1
    for index in range(3):
        alone = sampler(
            game.only(index), 1, 6, threshold=0.02, max_coalitions=10**6, generator=_seed(3)
        )
        assert alone.num_coalitions[0] == together.num_coalitions[index]
        torch.testing.assert_close(alone.values[0], together.values[index])
        torch.testing.assert_close(alone.ratio[0], together.ratio[index])


def test_finished_games_are_not_played_any_more():
    game = NarrowingGame(2, 6, None, seed=8)
    game.table[1] += torch.randn(64, dtype=torch.float64, generator=_seed(0))
    made = kernel_shap(game, 2, 6, threshold=0.005, max_coalitions=10**6)
    first, second = sorted(made.num_coalitions.tolist())
    assert first < second
    assert game.asked == 2 * (2 + first)
    assert game.narrowed.asked == second - first


def test_seeds_reproduce_and_differ():
    game = TableGame(1, 6, 1)
    for sampler in SAMPLERS.values():
        first, again, other = (
            sampler(game, 1, 6, threshold=None, max_coalitions=600, generator=_seed(s))
            for s in (1, 1, 2)
        )
        assert torch.equal(first.values, again.values)
        assert not torch.equal(first.values, other.values)


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    for sampler in SAMPLERS.values():
        sampler(TableGame(1, 5), 1, 5, threshold=None, max_coalitions=500)
    assert torch.equal(before, torch.get_rng_state())


def test_one_player_gets_everything():
    for sampler in SAMPLERS.values():
        made = sampler(TableGame(2, 1, 3), 2, 1)
        torch.testing.assert_close(made.values[:, 0], made.grand - made.empty)
        assert made.converged.all()


def test_a_flat_class_is_settled_and_does_not_block_the_others():
    game = TableGame(1, 6, 2, seed=1, dtype=torch.float32)
    bits = torch.arange(64)[:, None] >> torch.arange(6) & 1
    game.table[0, :, 1] = bits.sum(1) * 0.1
    made = kernel_shap(game, 1, 6, threshold=0.02, max_coalitions=10**5)
    assert made.converged.all()
    torch.testing.assert_close(made.values[0, :, 1], torch.full((6,), 0.1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_patches", [20, 80])
def test_equal_values_of_many_players_are_settled(dtype, num_patches):
    """Regression is exact for additive games; what is left is rounding over rounding."""

    def value(coalitions):
        counts = coalitions.to(dtype).sum(-1) / 3
        return torch.stack((counts, 0.3 * counts + coalitions[..., 0]), dim=-1)

    made = kernel_shap(value, 2, num_patches, threshold=0.01)
    assert made.converged.all()
    expected = torch.full((2, num_patches), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(made.values[..., 0], expected, atol=1e-5, rtol=1e-5)
    assert (made.num_coalitions <= 60 * num_patches + 5 * 256).all()


def test_not_converged_warns_with_the_ratio_and_a_forecast():
    game = TableGame(2, 7, None, seed=3, smooth=False)
    for sampler in SAMPLERS.values():
        with pytest.warns(ConvergenceWarning, match=r"2 of 2 games .* ratio .* is 0\.\d+"):
            made = sampler(game, 2, 7, threshold=1e-3, max_coalitions=3000)
        assert not made.converged.any()
        expected = made.num_coalitions * (made.ratio / 1e-3) ** 2
        torch.testing.assert_close(made.forecast(1e-3), expected)
    with pytest.warns(ConvergenceWarning, match="unknown"):
        kernel_shap(game, 2, 7, threshold=0.1, max_coalitions=200)


def test_singular_regression_asks_for_more():
    with pytest.raises(EstimationError, match=r"4 coalitions is singular .* at least 80"):
        kernel_shap(TableGame(1, 8), 1, 8, max_coalitions=4)
    with pytest.raises(EstimationError, match="takes 14 coalitions"):
        permutation_sampling(TableGame(1, 8), 1, 8, max_coalitions=13)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"max_coalitions": 0}, "max_coalitions is 0"),
        ({"batch_size": 7}, "batch_size is 7"),
        ({"variance_batches": 0}, "variance_batches is 0"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ArgumentError, match=match):
        kernel_shap(TableGame(1, 4), 1, 4, **options)


def test_games_that_are_none():
    for value, error in [
        (lambda s: s.double()[None], ArgumentError),
        (lambda s: s.sum(-1), ArgumentError),
        (lambda s: s.double().sum(-1)[:, :1], ArgumentError),
        (lambda s: s.double().sum(-1) / 0, EstimationError),
    ]:
        for run in (kernel_shap, permutation_sampling, enumerate_coalitions):
            with pytest.raises(error):
                run(value, 1, 4)
    with pytest.raises(ArgumentError, match="batch is 0"):
        kernel_shap(TableGame(1, 4), 0, 4)
    with pytest.raises(ArgumentError, match=r"1\.\.16"):
        enumerate_coalitions(TableGame(1, 4), 1, 17)
    with pytest.raises(ArgumentError, match="even"):
        enumerate_coalitions(TableGame(1, 4), 1, 4, batch_size=3)


def test_the_definition_itself_on_a_known_game():
    """Three players, v = 1 if players 0 and 1 are both there: each gets a half, 2 nothing."""
    table = np.array([float(row & 3 == 3) for row in range(8)])
    np.testing.assert_allclose(shapley_by_definition(table), [0.5, 0.5, 0])
