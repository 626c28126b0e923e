"""A wrapped image as a game: what it answers, who can play it, and what it leaves alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shapwrap.errors import (
    ArgumentError,
    CoalitionError,
    CoalitionTypeError,
    ImageError,
    ImageTypeError,
    TargetError,
)
from shapwrap.values.patch_game import PatchGames
from shapwrap.values.players import patches_of, player_of_patch, sums_over_players
from tests.backbones import make_case
from tests.games import shapley_by_definition


def _case(kind="vit-average-norm-registers", **options):
    return make_case(kind, **options)


def _all(num):
    return (np.arange(2**num)[:, None] >> np.arange(num) & 1).astype(bool)


@pytest.mark.parametrize("kind", ["vit-average-norm-registers", "resnet"])
def test_values_are_those_of_value(kind):
    case = _case(kind, batch=1)
    game = case.wrapped.game(case.images[0], 2, chunk_size=5)
    masks = torch.rand(13, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = case.wrapped.value(case.images, masks[None])[0, :, 2]
    torch.testing.assert_close(game(masks), expected, atol=2e-5, rtol=2e-5)
    found = game(masks.numpy())
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    assert found.shape == (13,)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(game(masks[3].numpy()), found[3:4], atol=1e-5)


@torch.no_grad()
def test_facts():
    case = _case(batch=1)
    game = case.wrapped.game(case.images)
    logits = case.wrapped(case.images)[0]
    assert game.target == int(logits.argmax())
    assert (game.n_players, game.grid, game.players) == (12, (3, 4), (3, 4))
    assert game.grand_value == pytest.approx(float(logits.max()), abs=1e-5)
    assert game.empty_value == game.normalization_value == 0.0
    assert game(np.zeros(12, bool)) == [0.0]
    assert game(np.ones((1, 12), bool)) == pytest.approx([game.grand_value], abs=1e-6)
    assert "3 x 4 players" in repr(game)


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.data())
def test_players_are_blocks_of_patches(grid, data):
    players = (data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1])))
    owner = player_of_patch(grid, players)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = row * players[0] // grid[0] * players[1] + column * players[1] // grid[1]
            assert owner[row * grid[1] + column] == expected
    assert set(owner.tolist()) == set(range(players[0] * players[1]))
    coalition = torch.rand(1, players[0] * players[1]) < 0.5
    patches = patches_of(coalition, owner)
    values = torch.randn(1, grid[0] * grid[1], dtype=torch.float64)
    sums = sums_over_players(values, owner)
    torch.testing.assert_close((sums * coalition).sum(), (values * patches).sum())


def test_coarse_players_come_and_go_as_one():
    case = _case(batch=1, grid=(4, 6))
    game = case.wrapped.game(case.images[0], 1, players=(2, 3))
    assert game.n_players == 6
    cells = torch.tensor([[True, False, True], [False, True, False]])
    patches = cells.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    expected = case.wrapped.value(case.images, patches[None, None])[0, :, 1]
    torch.testing.assert_close(game(cells.flatten()[None]), expected, atol=2e-5, rtol=2e-5)


def test_shapiq_plays_it():
    import shapiq

    case = _case(batch=1, grid=(2, 4))
    game = case.wrapped.game(case.images[0], 3)
    expected = shapley_by_definition(game(_all(8)))
    exact = shapiq.ExactComputer(game, 8)("SV", 1)
    np.testing.assert_allclose([exact[(i,)] for i in range(8)], expected, atol=1e-6)
    span = np.ptp(expected)
    kernel = shapiq.approximator.KernelSHAP(n=8, random_state=0)(200, game)
    np.testing.assert_allclose([kernel[(i,)] for i in range(8)], expected, atol=0.1 * span)
    orders = shapiq.approximator.PermutationSamplingSV(n=8, random_state=0)(2000, game)
    np.testing.assert_allclose([orders[(i,)] for i in range(8)], expected, atol=0.1 * span)


@pytest.mark.parametrize("kind", ["vit-average-norm-registers", "resnet"])
def test_the_model_is_left_as_it_was(kind):
    case = _case(kind, batch=1)
    case.wrapped.train()
    next(iter(case.wrapped.model.children())).eval()
    modes = [module.training for module in case.wrapped.modules()]
    state = {k: v.clone() for k, v in case.wrapped.state_dict().items()}
    randomness = torch.get_rng_state()
    values = case.wrapped.game(case.images[0])(torch.ones(1, 12, dtype=torch.bool))
    assert not values.requires_grad
    assert modes == [module.training for module in case.wrapped.modules()]
    assert all(p.grad is None for p in case.wrapped.parameters())
    assert all(torch.equal(v, state[k]) for k, v in case.wrapped.state_dict().items())
    assert torch.equal(randomness, torch.get_rng_state())
    case.wrapped.eval()
    torch.testing.assert_close(values, case.wrapped.game(case.images[0])(torch.ones(1, 12) > 0))


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("paired", [True, False])
def test_games_of_a_batch(chunk_size, paired):
    case = _case(batch=3)
    masks = torch.rand(3, 6, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    if paired:
        masks[:, 1::2] = ~masks[:, 0::2]
    expected = case.wrapped.value(case.images, masks)
    games = PatchGames(case.wrapped, case.images, (3, 4), None, chunk_size)
    torch.testing.assert_close(games(masks), expected, atol=2e-5, rtol=2e-5)
    some = games.select(torch.tensor([2, 0]))
    torch.testing.assert_close(some(masks[[2, 0]]), expected[[2, 0]], atol=2e-5, rtol=2e-5)


def test_half_precision_has_values_in_float32():
    case = _case(batch=1)
    wrapped = case.wrapped.to(torch.bfloat16)
    game = wrapped.game(case.images[0].bfloat16())
    assert game(torch.ones(2, 12, dtype=torch.bool)).dtype == torch.float32


def test_views_of_arrays_are_coalitions_too():
    case = _case()
    game = case.wrapped.game(case.images[0])
    masks = np.random.default_rng(0).random((6, 12)) < 0.5
    values = game(masks)
    np.testing.assert_allclose(game(masks[::-1]), values[::-1], rtol=1e-5)
    np.testing.assert_allclose(game(np.asfortranarray(masks)), values, rtol=1e-5)
    np.testing.assert_allclose(game(np.broadcast_to(masks[0], (3, 12))), values[0], rtol=1e-5)
    frozen = masks.copy()
    frozen.flags.writeable = False
    np.testing.assert_allclose(game(frozen), values, rtol=1e-5)


def test_bad_input():
    case = _case()
    wrapped, image = case.wrapped, case.images[0]
    with pytest.raises(ImageError, match=r"images\[:1\]"):
        wrapped.game(case.images, 0)
    with pytest.raises(ImageError, match="NaN"):
        wrapped.game(image * torch.nan)
    with pytest.raises(ImageTypeError):
        wrapped.game(image.int())
    with pytest.raises(ImageTypeError):
        wrapped.game([1, 2])
    with pytest.raises(TargetError):
        wrapped.game(image, 99)
    for players in ((4, 4), (3, 5), (0, 1)):
        with pytest.raises(ArgumentError, match="players is"):
            wrapped.game(image, players=players)
    with pytest.raises(ArgumentError, match="chunk_size"):
        wrapped.game(image, chunk_size=0)
    game = wrapped.game(image)
    with pytest.raises(CoalitionTypeError, match="boolean"):
        game(np.ones((2, 12)))
    for shape in ((2, 11), (0, 12), (1, 2, 12)):
        with pytest.raises(CoalitionError, match="12"):
            game(np.ones(shape, bool))
